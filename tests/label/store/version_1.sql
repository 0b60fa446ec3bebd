PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE about (
	version INTEGER NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO about VALUES(1,'2026-11-29T16:40:29.872835+00:00');
CREATE TABLE items (
	number INTEGER NOT NULL, 
	id VARCHAR(255) NOT NULL, 
	messages TEXT NOT NULL, 
	response TEXT NOT NULL, 
	model TEXT NOT NULL, 
	licence TEXT NOT NULL, 
	source TEXT NOT NULL, 
	author VARCHAR(255) NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (id)
);
INSERT INTO items VALUES(1,'a','[{"role": "user", "content": "How many? (a)"}]',replace('1+1=2\n2+2=5','\n',char(10)),'some-model','MIT','tests','importer','2026-11-29T16:40:29.930087+00:00');
INSERT INTO items VALUES(2,'b','[{"role": "user", "content": "How many? (b)"}]','1+1=3, so 3','some-model','MIT','tests','importer','2026-11-29T16:40:29.945572+00:00');
INSERT INTO items VALUES(3,'c','[{"role": "user", "content": "How many? (c)"}]','1+1=3, so 3','some-model','MIT','tests','importer','2026-11-29T16:40:29.946207+00:00');
INSERT INTO items VALUES(4,'d','[{"role": "user", "content": "How many? (d)"}]','1+1=3, so 3','some-model','MIT','tests','importer','2026-11-29T16:40:29.967004+00:00');
INSERT INTO items VALUES(5,'e','[{"role": "user", "content": "How many? (e)"}]',replace('x\ny','\n',char(10)),'some-model','MIT','tests','importer','2026-11-29T16:40:29.967932+00:00');
CREATE TABLE tokens (
	number INTEGER NOT NULL, 
	item INTEGER NOT NULL, 
	tokenizer VARCHAR(64) NOT NULL, 
	offsets TEXT NOT NULL, 
	author VARCHAR(255) NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (item, tokenizer), 
	FOREIGN KEY(item) REFERENCES items (number)
);
INSERT INTO tokens VALUES(1,1,'t','[[0, 5], [5, 6], [6, 11]]','importer','2026-11-29T16:40:29.969647+00:00');
CREATE TABLE entries (
	number INTEGER NOT NULL, 
	item INTEGER NOT NULL, 
	undoes INTEGER, 
	verdict VARCHAR(16), 
	labelled_by VARCHAR(255) NOT NULL, 
	how VARCHAR(16), 
	error_start INTEGER, 
	error_end INTEGER, 
	checked_start INTEGER, 
	checked_end INTEGER, 
	note TEXT NOT NULL, 
	seconds FLOAT, 
	author VARCHAR(255) NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (number), 
	FOREIGN KEY(item) REFERENCES items (number), 
	UNIQUE (undoes), 
	FOREIGN KEY(undoes) REFERENCES entries (number)
);
INSERT INTO entries VALUES(1,1,NULL,'wrong','set','person',6,11,NULL,NULL,'',NULL,'importer','2026-11-29T16:40:29.998277+00:00');
INSERT INTO entries VALUES(2,2,NULL,'unplaced','rule-1','rule',NULL,NULL,NULL,NULL,'it''s',NULL,'importer','2026-11-29T16:40:30.024955+00:00');
INSERT INTO entries VALUES(3,5,NULL,'correct','set','person',NULL,NULL,0,1,'',NULL,'importer','2026-11-29T16:40:30.025712+00:00');
INSERT INTO entries VALUES(4,2,NULL,'wrong','alice','person',4,5,NULL,NULL,'',2.5,'alice','2026-11-29T16:40:30.150040+00:00');
INSERT INTO entries VALUES(5,3,NULL,'correct','alice','person',NULL,NULL,NULL,NULL,'',NULL,'alice','2026-11-29T16:40:30.254297+00:00');
INSERT INTO entries VALUES(6,3,5,NULL,'alice',NULL,NULL,NULL,NULL,NULL,'',NULL,'alice','2026-11-29T16:40:30.301180+00:00');
CREATE TABLE assignments (
	number INTEGER NOT NULL, 
	item INTEGER NOT NULL, 
	seat INTEGER NOT NULL, 
	turn INTEGER NOT NULL, 
	annotator VARCHAR(255) NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (item, seat, turn), 
	UNIQUE (item, annotator), 
	FOREIGN KEY(item) REFERENCES items (number)
);
INSERT INTO assignments VALUES(1,2,0,0,'alice','2026-11-29T16:40:30.085288+00:00');
INSERT INTO assignments VALUES(2,3,0,0,'alice','2026-11-29T16:40:30.202071+00:00');
INSERT INTO assignments VALUES(3,3,0,1,'bob','2026-11-29T16:40:30.458299+00:00');
CREATE TABLE releases (
	assignment INTEGER NOT NULL, 
	reason TEXT NOT NULL, 
	author VARCHAR(255) NOT NULL, 
	at VARCHAR(32) NOT NULL, 
	PRIMARY KEY (assignment), 
	FOREIGN KEY(assignment) REFERENCES assignments (number)
);
INSERT INTO releases VALUES(2,'no idea','alice','2026-11-29T16:40:30.393417+00:00');
CREATE TRIGGER about_no_update BEFORE UPDATE ON about BEGIN SELECT RAISE(ABORT, 'rows of about are never changed or deleted'); END;
CREATE TRIGGER about_no_delete BEFORE DELETE ON about BEGIN SELECT RAISE(ABORT, 'rows of about are never changed or deleted'); END;
CREATE TRIGGER items_no_update BEFORE UPDATE ON items BEGIN SELECT RAISE(ABORT, 'rows of items are never changed or deleted'); END;
CREATE TRIGGER items_no_delete BEFORE DELETE ON items BEGIN SELECT RAISE(ABORT, 'rows of items are never changed or deleted'); END;
CREATE TRIGGER tokens_no_update BEFORE UPDATE ON tokens BEGIN SELECT RAISE(ABORT, 'rows of tokens are never changed or deleted'); END;
CREATE TRIGGER tokens_no_delete BEFORE DELETE ON tokens BEGIN SELECT RAISE(ABORT, 'rows of tokens are never changed or deleted'); END;
CREATE INDEX ix_entries_item ON entries (item);
CREATE INDEX ix_entries_labelled_by ON entries (labelled_by);
CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'rows of entries are never changed or deleted'); END;
CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'rows of entries are never changed or deleted'); END;
CREATE INDEX ix_assignments_annotator ON assignments (annotator);
CREATE TRIGGER assignments_no_update BEFORE UPDATE ON assignments BEGIN SELECT RAISE(ABORT, 'rows of assignments are never changed or deleted'); END;
CREATE TRIGGER assignments_no_delete BEFORE DELETE ON assignments BEGIN SELECT RAISE(ABORT, 'rows of assignments are never changed or deleted'); END;
CREATE TRIGGER releases_no_update BEFORE UPDATE ON releases BEGIN SELECT RAISE(ABORT, 'rows of releases are never changed or deleted'); END;
CREATE TRIGGER releases_no_delete BEFORE DELETE ON releases BEGIN SELECT RAISE(ABORT, 'rows of releases are never changed or deleted'); END;
COMMIT;
