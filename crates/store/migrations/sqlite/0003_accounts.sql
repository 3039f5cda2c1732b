-- Who may use heyvm's servers. Times are milliseconds since 1970; what is secret is there as a hash alone, but for the
-- signing keys.
CREATE TABLE accounts (
    id               TEXT PRIMARY KEY,
    name             TEXT NOT NULL UNIQUE,
    created_at       BIGINT NOT NULL,
    -- Quotas; where there is none, the server's default counts.
    max_running      BIGINT,
    max_vcpu_millis  BIGINT,
    max_memory_mib   BIGINT,
    max_disk_gb      BIGINT,
    max_archive_mib  BIGINT,
    max_ttl_seconds  BIGINT
);

CREATE TABLE users (
    id               TEXT PRIMARY KEY,
    account_id       TEXT NOT NULL REFERENCES accounts (id),
    -- Lower case.
    email            TEXT NOT NULL UNIQUE,
    -- argon2id, as a PHC string.
    password_hash    TEXT NOT NULL,
    scope            TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    disabled_at      BIGINT
);

CREATE TABLE api_keys (
    id               TEXT PRIMARY KEY,
    account_id       TEXT NOT NULL REFERENCES accounts (id),
    -- Who made it; it dies with that user. Without one, the server's operator made it.
    user_id          TEXT REFERENCES users (id),
    name             TEXT NOT NULL,
    prefix           TEXT NOT NULL,
    hash             TEXT NOT NULL UNIQUE,
    scope            TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    expires_at       BIGINT,
    last_used_at     BIGINT,
    revoked_at       BIGINT
);
CREATE INDEX api_keys_by_account ON api_keys (account_id);

CREATE TABLE sessions (
    id               TEXT PRIMARY KEY,
    account_id       TEXT NOT NULL REFERENCES accounts (id),
    -- Who logged in; or the API key that was exchanged, with the user who made it.
    user_id          TEXT REFERENCES users (id),
    api_key_id       TEXT REFERENCES api_keys (id),
    scope            TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    expires_at       BIGINT NOT NULL,
    ended_at         BIGINT
);

-- Also those that were used: one that comes again ends its session.
CREATE TABLE refresh_tokens (
    hash             TEXT PRIMARY KEY,
    session_id       TEXT NOT NULL REFERENCES sessions (id),
    created_at       BIGINT NOT NULL,
    used_at          BIGINT
);
CREATE INDEX refresh_tokens_by_session ON refresh_tokens (session_id);

CREATE TABLE signing_keys (
    -- Counts up; of servers that rotate at the same time one gets the next number.
    generation       BIGINT PRIMARY KEY,
    kid              TEXT NOT NULL UNIQUE,
    public_key       TEXT NOT NULL,
    private_key      TEXT NOT NULL,
    created_at       BIGINT NOT NULL,
    signs_from       BIGINT NOT NULL
);

CREATE TABLE audit_log (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    at               BIGINT NOT NULL,
    account_id       TEXT NOT NULL,
    actor            TEXT NOT NULL,
    action           TEXT NOT NULL,
    target           TEXT NOT NULL,
    status           BIGINT NOT NULL,
    request_id       TEXT,
    ip               TEXT
);
CREATE INDEX audit_log_by_account ON audit_log (account_id, id);
