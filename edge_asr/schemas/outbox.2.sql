-- The outbox, schema version 2: what became of the last commands at the MES.

CREATE TABLE receipt (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  boot_id TEXT NOT NULL,
  expires_ns INTEGER,
  delivered_ns INTEGER, -- when the broker took it, if it was still a command then
  verdict TEXT,         -- accepted, rejected
  reason TEXT,
  at_wall_ns INTEGER,
  missed INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE receipt_ledger (verdict TEXT PRIMARY KEY, counted INTEGER NOT NULL DEFAULT 0);
INSERT INTO receipt_ledger (verdict) VALUES ('accepted'), ('rejected'), ('missing');

CREATE TRIGGER command_in AFTER INSERT ON message WHEN NEW.topic = 'evt/command' BEGIN
  INSERT OR IGNORE INTO receipt (seq, id, boot_id, expires_ns) VALUES (NEW.seq, NEW.id, NEW.boot_id, NEW.expires_ns);
  DELETE FROM receipt WHERE seq IN (SELECT seq FROM receipt ORDER BY seq DESC LIMIT -1 OFFSET 1000);
END;
CREATE TRIGGER receipt_in AFTER UPDATE OF verdict ON receipt BEGIN
  UPDATE receipt_ledger SET counted = counted - 1 WHERE verdict = OLD.verdict;
  UPDATE receipt_ledger SET counted = counted + 1 WHERE verdict = NEW.verdict;
END;
CREATE TRIGGER receipt_missed AFTER UPDATE OF missed ON receipt WHEN NEW.missed > OLD.missed BEGIN
  UPDATE receipt_ledger SET counted = counted + 1 WHERE verdict = 'missing';
END;
