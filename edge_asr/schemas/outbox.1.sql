-- The outbox, schema version 1. Published files are never edited: the next change is outbox.2.sql.

CREATE TABLE message (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL,
  boot_id TEXT NOT NULL,
  topic TEXT NOT NULL,
  category TEXT NOT NULL,
  data TEXT NOT NULL,
  created_wall_ns INTEGER NOT NULL,
  created_ns INTEGER NOT NULL,
  expires_ns INTEGER,
  time_quality TEXT NOT NULL,
  crc INTEGER NOT NULL,
  refusals INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX message_by_category ON message (category, seq);

CREATE TABLE dead_letter (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL,
  boot_id TEXT NOT NULL,
  topic TEXT NOT NULL,
  category TEXT NOT NULL,
  data TEXT NOT NULL,
  created_wall_ns INTEGER NOT NULL,
  created_ns INTEGER NOT NULL,
  expires_ns INTEGER,
  time_quality TEXT NOT NULL,
  crc INTEGER NOT NULL,
  reason TEXT NOT NULL
);

CREATE TABLE ledger (
  category TEXT PRIMARY KEY,
  waiting INTEGER NOT NULL DEFAULT 0,
  dropped INTEGER NOT NULL DEFAULT 0
);
INSERT INTO ledger (category) VALUES ('dead-letter'), ('transcript'), ('rejection'), ('alarm'), ('command');
CREATE TRIGGER message_in AFTER INSERT ON message BEGIN
  UPDATE ledger SET waiting = waiting + 1 WHERE category = NEW.category;
END;
CREATE TRIGGER message_out AFTER DELETE ON message BEGIN
  UPDATE ledger SET waiting = waiting - 1 WHERE category = OLD.category;
END;
CREATE TRIGGER dead_letter_in AFTER INSERT ON dead_letter BEGIN
  UPDATE ledger SET waiting = waiting + 1 WHERE category = 'dead-letter';
END;
CREATE TRIGGER dead_letter_out AFTER DELETE ON dead_letter BEGIN
  UPDATE ledger SET waiting = waiting - 1 WHERE category = 'dead-letter';
END;

CREATE TABLE damage (at_wall_ns INTEGER NOT NULL, rescued INTEGER NOT NULL, kept_as TEXT NOT NULL);
PRAGMA application_id = 0x45415352; -- "EASR"

