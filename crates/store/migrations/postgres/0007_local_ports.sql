-- Ports on the host's loopback that lead where subdomains do: the same after a restart.
CREATE TABLE local_ports (
    subdomain   TEXT PRIMARY KEY,
    port        BIGINT NOT NULL UNIQUE
);
