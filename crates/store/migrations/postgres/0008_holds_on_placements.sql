-- Operations under way that make a sandbox run or grow: until they end, or the hold lapses, what they asked for counts.
ALTER TABLE placements ADD COLUMN holds BIGINT NOT NULL DEFAULT 0;
ALTER TABLE placements ADD COLUMN held_until BIGINT NOT NULL DEFAULT 0;
