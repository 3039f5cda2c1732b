-- Whose a sandbox is ('': the owner of the daemon's machine); names and slugs are unique within an account.
ALTER TABLE sandboxes ADD COLUMN account TEXT NOT NULL DEFAULT '';
DROP INDEX living_names;
DROP INDEX living_slugs;
CREATE UNIQUE INDEX living_names ON sandboxes (account, name) WHERE living;
CREATE UNIQUE INDEX living_slugs ON sandboxes (account, slug) WHERE living;

-- Whether a port answers everyone; else the members of the account.
ALTER TABLE endpoints ADD COLUMN is_public BOOLEAN NOT NULL DEFAULT TRUE;
