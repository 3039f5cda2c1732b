-- Who owns the VMs whose directories name this id.
CREATE TABLE store_id (
    only_one    BIGINT PRIMARY KEY CHECK (only_one = 1),
    id          TEXT NOT NULL
);
