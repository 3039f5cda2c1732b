-- A server's view of a cloud: whose sandbox is in which region. What the region tells of it stands in `info` (JSON).
CREATE TABLE placements (
    id          TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL,
    region      TEXT NOT NULL,
    name        TEXT NOT NULL,
    slug        TEXT NOT NULL,
    holds_name  BOOLEAN NOT NULL,
    running     BOOLEAN NOT NULL,
    gone        BOOLEAN NOT NULL,
    failed      BOOLEAN NOT NULL,
    created_at  BIGINT NOT NULL,
    changed_at  BIGINT NOT NULL,
    vcpu_millis BIGINT NOT NULL,
    memory_mib  BIGINT NOT NULL,
    disk_gb     BIGINT NOT NULL,
    archive_id  TEXT,
    info        TEXT NOT NULL
);
CREATE UNIQUE INDEX placement_names ON placements (account_id, name) WHERE holds_name;
CREATE UNIQUE INDEX placement_slugs ON placements (account_id, slug) WHERE holds_name;
CREATE INDEX placements_by_account ON placements (account_id, created_at);
CREATE INDEX placements_by_region ON placements (region);

-- Where a subdomain led when the region last told: the region itself is asked before anybody is let in.
CREATE TABLE subdomains (
    subdomain   TEXT PRIMARY KEY,
    sandbox_id  TEXT NOT NULL
);
CREATE INDEX subdomains_by_sandbox ON subdomains (sandbox_id);
