-- One row per sandbox; what is looked for stands in columns, the rest in `data` (JSON).
CREATE TABLE sandboxes (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    slug        TEXT NOT NULL,
    -- Whether it holds its name: provisioning, running or stopping, and not waiting to replace another.
    living      BOOLEAN NOT NULL,
    removed     BOOLEAN NOT NULL,
    created_at  BIGINT NOT NULL,
    changed_at  BIGINT NOT NULL,
    expires_at  BIGINT,
    data        TEXT NOT NULL
);
CREATE UNIQUE INDEX living_names ON sandboxes (name) WHERE living;
CREATE UNIQUE INDEX living_slugs ON sandboxes (slug) WHERE living;

CREATE TABLE endpoints (
    subdomain   TEXT PRIMARY KEY,
    sandbox_id  TEXT NOT NULL,
    port        BIGINT NOT NULL,
    created_at  BIGINT NOT NULL,
    UNIQUE (sandbox_id, port)
);

CREATE TABLE idempotency_keys (
    key         TEXT PRIMARY KEY,
    request     TEXT NOT NULL,
    sandbox_id  TEXT NOT NULL,
    created_at  BIGINT NOT NULL
);
