"""The tables of `metadata.db`.

Bytes are the node's, and so is `blobs`; what a namespace sees of them is `visible`. A pull under way is a lease of its
own: a row in `pulls`, and in `holds` whatever it needs, written before the thing itself, so that nothing collects it.
"""

from __future__ import annotations

CLAIMS = """
    CREATE TABLE claims (              -- hard links that keep a blob's bytes for who was given their path
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL,
        token      TEXT NOT NULL UNIQUE,
        expires_at REAL NOT NULL,
        PRIMARY KEY (namespace, digest)
    ) WITHOUT ROWID;
"""
CLAIMS_WHILE_SEEN = """
    CREATE TABLE claims_of_both_kinds (
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL,
        token      TEXT NOT NULL UNIQUE,
        expires_at REAL NOT NULL,
        while_seen INTEGER NOT NULL,   -- it goes with the namespace's right to see the blob
        PRIMARY KEY (namespace, digest, while_seen)
    ) WITHOUT ROWID;
    INSERT INTO claims_of_both_kinds SELECT namespace, digest, token, expires_at, 0 FROM claims;
    DROP TABLE claims;
    ALTER TABLE claims_of_both_kinds RENAME TO claims;
    CREATE INDEX claims_while_seen ON claims (digest) WHERE while_seen;
"""
UNLEASED = """
    CREATE TABLE unleased (            -- blobs that clients have written under no lease
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL,
        written_at REAL NOT NULL,
        PRIMARY KEY (namespace, digest)
    ) WITHOUT ROWID;
    CREATE TRIGGER blob_unleased AFTER DELETE ON visible
    BEGIN
        DELETE FROM unleased WHERE namespace = OLD.namespace AND digest = OLD.digest;
    END;
"""
SCRUB = """
    CREATE TABLE rotten (              -- blobs whose bytes are damaged, or gone
        digest     TEXT PRIMARY KEY REFERENCES blobs (digest) ON DELETE CASCADE,
        problem    TEXT NOT NULL,
        inode      INTEGER NOT NULL,   -- of the file that has them; 0 where there is none
        found_at   REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE scrub (               -- the one row says how far the pass in the background is
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        position   TEXT NOT NULL,      -- the last digest that was checked; empty between passes
        ended_at   REAL NOT NULL       -- when the last pass was over
    );
"""
COLLECTION = """
    CREATE TABLE blob_references (     -- what an index or a manifest leads to, by its own words
        parent     TEXT NOT NULL,
        child      TEXT NOT NULL,
        PRIMARY KEY (parent, child)
    ) WITHOUT ROWID;
    CREATE TRIGGER blob_gone AFTER DELETE ON blobs
    BEGIN
        DELETE FROM blob_references WHERE parent = OLD.digest;
    END;
    CREATE TABLE leases (
        namespace  TEXT NOT NULL,
        id         TEXT NOT NULL,
        labels     TEXT NOT NULL,
        created_at REAL NOT NULL,
        PRIMARY KEY (namespace, id)
    ) WITHOUT ROWID;
    CREATE TABLE lease_resources (
        namespace  TEXT NOT NULL,
        lease      TEXT NOT NULL,
        type       TEXT NOT NULL,      -- content, images, ingests, snapshots/<snapshotter>
        id         TEXT NOT NULL,
        PRIMARY KEY (namespace, lease, type, id),
        FOREIGN KEY (namespace, lease) REFERENCES leases (namespace, id) ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE INDEX lease_resources_id ON lease_resources (id);
    CREATE TABLE collection (          -- one row: the newest epoch of garbage collection
        token      TEXT NOT NULL,
        open       INTEGER NOT NULL,   -- 1 until the mark, 2 while snapshots are swept
        wanted     INTEGER NOT NULL    -- 1: something may have become superfluous since the last began; 2: asked for
    );
    INSERT INTO collection VALUES ('', 0, 1);
    CREATE TABLE collection_kept (     -- what has come to be a root, or been one, within it; `type` as a lease has it
        namespace  TEXT NOT NULL,
        type       TEXT NOT NULL,
        id         TEXT NOT NULL,
        labels     TEXT NOT NULL
    );
    CREATE TABLE collection_peers (    -- who has ever taken part: whoever has, is waited for
        name       TEXT PRIMARY KEY
    ) WITHOUT ROWID;
    CREATE TRIGGER blob_seen AFTER INSERT ON visible WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept VALUES (NEW.namespace, 'content', NEW.digest, '{}');
    END;
    CREATE TRIGGER blob_relabelled AFTER UPDATE OF labels ON visible WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept SELECT OLD.namespace, 'content', OLD.digest, value
            FROM json_each(json_array(OLD.labels, NEW.labels)) WHERE value LIKE '%containerd.io/gc.%';
    END;
    CREATE TRIGGER blob_hidden AFTER DELETE ON visible
    WHEN (SELECT open FROM collection) = 1 AND OLD.labels LIKE '%containerd.io/gc.%'
    BEGIN
        INSERT INTO collection_kept VALUES (OLD.namespace, 'content', OLD.digest, OLD.labels);
    END;
    CREATE TRIGGER image_made AFTER INSERT ON images WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept VALUES (NEW.namespace, 'images', NEW.name, '{}');
    END;
    CREATE TRIGGER image_changed AFTER UPDATE OF target, labels ON images
    BEGIN
        UPDATE collection SET wanted = 1 WHERE NOT wanted;
        INSERT INTO collection_kept SELECT OLD.namespace, 'content', json_extract(OLD.target, '$.digest'), OLD.labels
            FROM collection WHERE open = 1;
        INSERT INTO collection_kept SELECT NEW.namespace, 'images', NEW.name, '{}' FROM collection WHERE open = 1;
    END;
    CREATE TRIGGER image_deleted AFTER DELETE ON images
    BEGIN
        UPDATE collection SET wanted = 1 WHERE NOT wanted;
        INSERT INTO collection_kept SELECT OLD.namespace, 'content', json_extract(OLD.target, '$.digest'), OLD.labels
            FROM collection WHERE open = 1;
    END;
    CREATE TRIGGER lease_deleted AFTER DELETE ON leases
    BEGIN
        UPDATE collection SET wanted = 1 WHERE NOT wanted;
    END;
    CREATE TRIGGER lease_resource_added AFTER INSERT ON lease_resources WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept VALUES (NEW.namespace, NEW.type, NEW.id, '{}');
    END;
    CREATE TRIGGER lease_resource_removed AFTER DELETE ON lease_resources
    BEGIN
        UPDATE collection SET wanted = 1 WHERE NOT wanted;
        INSERT INTO collection_kept SELECT OLD.namespace, OLD.type, OLD.id, '{}' FROM collection WHERE open = 1;
    END;
    CREATE TRIGGER hold_added AFTER INSERT ON holds WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept VALUES (
            NEW.namespace, CASE NEW.snapshotter WHEN '' THEN 'content' ELSE 'snapshots/' || NEW.snapshotter END,
            NEW.key, '{}');
    END;
    CREATE TRIGGER hold_removed AFTER DELETE ON holds WHEN (SELECT open FROM collection) = 1
    BEGIN
        INSERT INTO collection_kept VALUES (
            OLD.namespace, CASE OLD.snapshotter WHEN '' THEN 'content' ELSE 'snapshots/' || OLD.snapshotter END,
            OLD.key, '{}');
    END;
    CREATE VIEW unwanted AS SELECT digest FROM blobs
        WHERE NOT EXISTS (SELECT 1 FROM visible WHERE visible.digest = blobs.digest)
          AND NOT EXISTS (SELECT 1 FROM holds WHERE holds.key = blobs.digest AND holds.snapshotter = '');
"""

MIGRATIONS = [
    """
    CREATE TABLE blobs (
        digest     TEXT PRIMARY KEY,
        size       INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE visible (
        namespace  TEXT NOT NULL,
        digest     TEXT NOT NULL REFERENCES blobs (digest),
        labels     TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        PRIMARY KEY (namespace, digest)
    ) WITHOUT ROWID;
    CREATE INDEX visible_digest ON visible (digest);
    CREATE TABLE ingests (
        namespace  TEXT NOT NULL,
        ref        TEXT NOT NULL,
        file       TEXT NOT NULL UNIQUE,
        total      INTEGER NOT NULL,
        expected   TEXT NOT NULL,
        pull       TEXT NOT NULL,      -- the pull it is for; empty for a client's own
        labels     TEXT NOT NULL,
        started_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        placing    TEXT NOT NULL DEFAULT '',  -- the digest under which its file is about to be a blob
        session    TEXT NOT NULL DEFAULT '',  -- its writer, until
        session_until REAL NOT NULL DEFAULT 0,
        PRIMARY KEY (namespace, ref)
    ) WITHOUT ROWID;
    CREATE INDEX ingests_placing ON ingests (placing) WHERE placing != '';
    CREATE TABLE images (
        namespace  TEXT NOT NULL,
        name       TEXT NOT NULL,
        target     TEXT NOT NULL,
        labels     TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        request_id TEXT NOT NULL,
        PRIMARY KEY (namespace, name)
    ) WITHOUT ROWID;
    CREATE TABLE pulls (
        id         TEXT PRIMARY KEY,
        namespace  TEXT NOT NULL,
        nonce      TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE holds (
        pull        TEXT NOT NULL REFERENCES pulls (id),
        namespace   TEXT NOT NULL,
        snapshotter TEXT NOT NULL,     -- empty: `key` is a blob's digest, else a chain ID
        key         TEXT NOT NULL,
        PRIMARY KEY (pull, snapshotter, key)
    ) WITHOUT ROWID;
    CREATE INDEX holds_key ON holds (key);
    CREATE TABLE namespaces (
        name       TEXT PRIMARY KEY,
        labels     TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    CLAIMS,
    SCRUB,
    COLLECTION,
    CLAIMS_WHILE_SEEN,
    UNLEASED,
]
