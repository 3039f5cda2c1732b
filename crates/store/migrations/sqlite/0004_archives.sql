-- Archives of accounts. `object` is where in the archives' storage a content is; any number of archives may have it.
CREATE TABLE archive_objects (
    hash        TEXT PRIMARY KEY,
    object      TEXT NOT NULL UNIQUE,
    size        BIGINT NOT NULL
);

CREATE TABLE archives (
    id          TEXT PRIMARY KEY,
    account     TEXT NOT NULL,
    name        TEXT,
    -- Hash of what lets one upload it, until it is finalized.
    ticket      TEXT,
    hash        TEXT REFERENCES archive_objects (hash),
    created_at  BIGINT NOT NULL,
    -- When it could be used from; NULL while it waits for its upload.
    finalized_at BIGINT
);
CREATE INDEX archives_of_accounts ON archives (account, created_at);
CREATE INDEX archives_by_hash ON archives (hash);
