BEGIN TRANSACTION;
CREATE TABLE audit (                     -- besides commands, which have their own
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        event TEXT NOT NULL,
        caller TEXT NOT NULL,
        address TEXT NOT NULL,
        subject TEXT NOT NULL
    );
INSERT INTO "audit" VALUES(1,1795731211621,'token.created','moltis','','Demo node');
INSERT INTO "audit" VALUES(2,1795731220570,'key.created','this machine','127.0.0.1','reader (operator.read)');
INSERT INTO "audit" VALUES(3,1795731220990,'key.created','this machine','127.0.0.1','old key (operator.write)');
INSERT INTO "audit" VALUES(4,1795731221505,'key.revoked','this machine','127.0.0.1','old key');
INSERT INTO "audit" VALUES(5,1795731222036,'login.created','this machine','127.0.0.1','Firefox');
INSERT INTO "audit" VALUES(6,1795731222430,'token.created','this machine','127.0.0.1','never came');
INSERT INTO "audit" VALUES(7,1795731222482,'token.created','this machine','127.0.0.1','gone');
INSERT INTO "audit" VALUES(8,1795731222486,'token.revoked','this machine','127.0.0.1','gone');
CREATE TABLE commands (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        invoke_id TEXT NOT NULL UNIQUE,
        asked_at INTEGER NOT NULL,
        started_at INTEGER,
        ended_at INTEGER,
        caller_kind TEXT NOT NULL,
        caller_name TEXT NOT NULL,
        session_key TEXT,
        node_id TEXT NOT NULL,
        node_name TEXT NOT NULL,
        command TEXT NOT NULL,
        cwd TEXT,
        state TEXT NOT NULL,
        exit_code INTEGER,
        signal TEXT,
        stdout_bytes INTEGER NOT NULL DEFAULT 0,
        stderr_bytes INTEGER NOT NULL DEFAULT 0,
        error TEXT
    , decided_by TEXT, timeout_ms INTEGER, cancelled_at INTEGER);
INSERT INTO "commands" VALUES(1,'e4fd3d9f-86b3-46e0-a568-1f6e559a64ad',1795731214680,1795731214682,1795731214697,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo hello; echo oops >&2; exit 3',NULL,'done',3,NULL,6,5,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(2,'75b7aa48-0be7-46a1-ae9b-9c538c60d02b',1795731215191,1795731215192,1795731215196,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo fine',NULL,'done',0,NULL,5,0,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(3,'fc606852-e8d5-4359-ae79-e62b7c032d6b',1795731215721,1795731215721,1795731216241,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','sleep 20',NULL,'timed_out',-1,'15',0,0,NULL,NULL,500,NULL);
INSERT INTO "commands" VALUES(4,'fb797f59-9fb5-4440-95e4-4fea4f1d797d',1795731216741,1795731216741,1795731216745,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','kill -9 $$',NULL,'done',-1,'9',0,0,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(5,'274109d2-5b1d-4c12-8127-a1f7597ff98f',1795731217315,NULL,1795731217316,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','true','/nowhere','failed',NULL,NULL,0,0,'cannot use the working directory /nowhere: No such file or directory',NULL,NULL,NULL);
INSERT INTO "commands" VALUES(6,'15f9ef3b-563b-4a8f-9b06-4688cb2eed2f',1795731217987,1795731217987,1795731218005,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo in the background',NULL,'done',0,NULL,18,0,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(7,'3f179330-c870-4f10-b0c0-fd74a8f2fe52',1795731219568,1795731219569,1795731220135,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','sleep 30',NULL,'cancelled',-1,'15',0,0,NULL,NULL,NULL,1795731220112);
INSERT INTO "commands" VALUES(8,'bc6f5111-7d0d-4856-b8e4-75c9082bddf3',1795731222889,1795731222889,1795731222893,'operator','this machine','main','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo shown in a card',NULL,'done',0,NULL,16,0,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(9,'1953b340-4639-4b57-8346-ce3f8e5abeb6',1795731223421,1795731223421,1795731223446,'operator','this machine','main','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','seq 1 90000',NULL,'done',0,NULL,528894,0,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(10,'219a9381-3344-4ebc-9aa0-f12ceb9edb2d',1795731224018,1795731224018,1795731224022,'operator','this machine','main','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo to the log; echo to stderr >&2; false',NULL,'done',1,NULL,11,10,NULL,NULL,NULL,NULL);
INSERT INTO "commands" VALUES(11,'5f66db72-c49f-4f9a-a919-0ee26bf77dcb',1795731224516,1795731224516,1795731224519,'model','ollama/llama3.2 for this machine','7a9547d8-ce08-4edf-8a39-06312e820b88','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','echo from the model',NULL,'done',0,NULL,15,0,NULL,'this machine',20000,NULL);
INSERT INTO "commands" VALUES(12,'02e10932-bd66-440f-b905-81913cdf6b4e',1795731224528,1795731224528,1795731224834,'model','ollama/llama3.2 for this machine','7a9547d8-ce08-4edf-8a39-06312e820b88','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','sleep 0.3; echo later',NULL,'done',0,NULL,6,0,NULL,'this machine',NULL,NULL);
INSERT INTO "commands" VALUES(13,'fec3cd33-64a0-4787-8143-29d266341fae',1795731226886,NULL,NULL,'operator','this machine',NULL,'6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','Demo node','sleep 300',NULL,'sent',NULL,NULL,0,0,NULL,NULL,NULL,NULL);
CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        display_name TEXT NOT NULL,
        renamed INTEGER NOT NULL DEFAULT 0,  -- by an operator, for good
        platform TEXT NOT NULL,
        version TEXT NOT NULL DEFAULT '',
        handle TEXT NOT NULL UNIQUE,         -- SCRAM username
        token_hash TEXT NOT NULL UNIQUE,     -- SHA-256, hex
        verifier TEXT NOT NULL,              -- RFC 5803
        node_id TEXT,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,                  -- unless it has connected before
        last_seen_at INTEGER,
        last_ip TEXT NOT NULL DEFAULT '',
        telemetry TEXT NOT NULL DEFAULT '{}',
        capabilities TEXT NOT NULL DEFAULT '[]',
        commands TEXT NOT NULL DEFAULT '[]',
        revoked_at INTEGER
    );
INSERT INTO "devices" VALUES('8e3a2253-0edc-4c13-89aa-a7495ba69a63','Demo node',0,'linux','0.1.0','cf3abb752b78d1b947bb4b63c1519dec','97746def713e59a79b6d6fe7b656da8c5f14ab37bf0fdb5c48b6a4d384710d22','SCRAM-SHA-256$4096:4bXsW35yWvvGc7p0KDnYJg==$qgJ62SREXirHSW2N/ZK1+hek1bHs+wY1HOk8/G9p7wk=:qQX0oxxnU2wF6/SKsY6p7lKgIp3G8ZDcOzMqcK8QgVw=','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3',1795731211615,NULL,1795731211731,'127.0.0.1','{"nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","mem":{"total":25276510208,"available":24710225920},"cpuCount":2,"uptime":1713,"disk":{"total":270553174016,"available":84786950144},"load":[0.27,0.33,0.35],"providers":[{"provider":"ollama","models":["llama3.2"]}]}','["auth.scram","exec.stream","exec.cancel","exec.resume"]','["system.run","system.which","system.providers"]',NULL);
INSERT INTO "devices" VALUES('5e30aa41-06ea-48df-9b39-8e119779b62f','never came',0,'','','39aa1327c7aa4285fe157354da7828df','d3f46302e51a46393b7d6cb1e8ed684efb9c90f09f9472ddba4b063e0a9261cc','SCRAM-SHA-256$4096:c3fPvFmqQ/uxWtVGgL8kwA==$VFr6HYke3ZjMschwhVzpLTNUpvcJQ8mq1FQG3DsEuMU=:VApC5TDv394xlqlKm0xrxFJjfyX4yvQcsk+9L50eAlc=',NULL,1795731222428,NULL,NULL,'','{}','[]','[]',NULL);
INSERT INTO "devices" VALUES('2b60486c-76a8-44d8-9298-2cf68cea0633','gone',0,'','','310eccbec32893c16ec7da6963f8a037','7ac27938247314e262892be066858b05e2c4e06555907e31821e7a57eb603798','SCRAM-SHA-256$4096:qTqf6SvJQZzLWdJd0XJOww==$pVFm9KZwXebJXa9b4TkXE5i4sK01BL4yhwX7j5fhvC8=:6Utags/tAMoIlFp/Jq8jWne+3A6AwGmI9mM19jbK7pQ=',NULL,1795731222479,NULL,NULL,'','{}','[]','[]',1795731222486);
CREATE TABLE join_codes (
        code_hash TEXT PRIMARY KEY,          -- SHA-256, hex
        device_id TEXT NOT NULL REFERENCES devices(id) ON DELETE CASCADE,
        expires_at INTEGER NOT NULL
    );
INSERT INTO "join_codes" VALUES('5acdfa586a11048a4c303fd8c61a9032b73f45b4bc180bf0f01d6a3a13e4aab3','5e30aa41-06ea-48df-9b39-8e119779b62f',1795731822430);
INSERT INTO "join_codes" VALUES('6b740ff1a9ed6029e23282e323948919d40f7ac353022559a5f74c8be463cebb','2b60486c-76a8-44d8-9298-2cf68cea0633',1795731822482);
CREATE TABLE logins (
        id TEXT PRIMARY KEY,
        cookie_hash TEXT NOT NULL UNIQUE,    -- SHA-256, hex
        key_id TEXT NOT NULL REFERENCES operator_keys(id) ON DELETE CASCADE,
        created_at INTEGER NOT NULL,
        last_used_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        user_agent TEXT NOT NULL,
        address TEXT NOT NULL
    );
INSERT INTO "logins" VALUES('c7605239-7c0e-4fdc-b90a-69db1571d4de','cbd30814dd691ed86de5a368f5d794fc6aa193dd2ec286d3caf605cffadc1f9b','bf0894b2-4323-4f37-85ad-944527cf2340',1795731222036,1795731222036,1798323222036,'Firefox','127.0.0.1');
CREATE TABLE messages (
        id TEXT PRIMARY KEY,
        session_key TEXT NOT NULL REFERENCES sessions(key) ON DELETE CASCADE,
        run_id TEXT NOT NULL,
        role TEXT NOT NULL,
        created_at INTEGER NOT NULL,         -- unique in its session, which it orders
        state TEXT NOT NULL,
        seq INTEGER NOT NULL,                -- of the last change
        text TEXT NOT NULL,
        invoke_id TEXT UNIQUE,               -- of a command
        details TEXT NOT NULL                -- JSON
    );
INSERT INTO "messages" VALUES('af37473a-9773-4535-938c-76c70830a55e','main','958e8aa9-6ab0-4a8b-966d-0519fffd1bcc','user',1795731222881,'done',1,'echo shown in a card',NULL,'{}');
INSERT INTO "messages" VALUES('7c0ad196-c3d4-4b12-8b65-16425db70666','main','958e8aa9-6ab0-4a8b-966d-0519fffd1bcc','command',1795731222888,'done',6,'','bc6f5111-7d0d-4856-b8e4-75c9082bddf3','{"command":{"invokeId":"bc6f5111-7d0d-4856-b8e4-75c9082bddf3","nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","node":"Demo node","command":"echo shown in a card","startedAt":1795731222889,"endedAt":1795731222893,"exitCode":0,"output":[["stdout","shown in a card\n"]],"stdoutBytes":16,"stderrBytes":0}}');
INSERT INTO "messages" VALUES('f09af8d1-e7af-451d-b692-1e311f96ce3d','main','7a1d5346-130a-41da-b721-c8b0a11b4a7a','user',1795731223418,'done',9,'seq 1 90000',NULL,'{}');
INSERT INTO "messages" VALUES('792d71a8-3ebd-4f1b-a5b5-6130c1b4fb38','main','7a1d5346-130a-41da-b721-c8b0a11b4a7a','command',1795731223420,'done',14,'','1953b340-4639-4b57-8346-ce3f8e5abeb6','{"command":{"invokeId":"1953b340-4639-4b57-8346-ce3f8e5abeb6","nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","node":"Demo node","command":"seq 1 90000","startedAt":1795731223421,"endedAt":1795731223446,"exitCode":0,"output":[["stdout","1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\n15\n16\n17\n18\n19\n20\n21\n22\n23\n24\n25\n26\n27\n28\n29\n30\n31\n32\n33\n34\n35\n36\n3"],["stdout","984\n89985\n89986\n89987\n89988\n89989\n89990\n89991\n89992\n89993\n89994\n89995\n89996\n89997\n89998\n89999\n90000\n"]],"stdoutBytes":528894,"stderrBytes":0,"cut":528694,"cutAt":1}}');
INSERT INTO "messages" VALUES('b7acc531-4c6e-454d-969e-461bbc96015b','main','0f8e09da-a2fa-474f-a6b7-3b96546e9de7','user',1795731224015,'done',17,'echo to the log; echo to stderr >&2; false',NULL,'{}');
INSERT INTO "messages" VALUES('5cb3b38e-14f8-4801-ac89-5c5de9e76479','main','0f8e09da-a2fa-474f-a6b7-3b96546e9de7','command',1795731224017,'done',22,'','219a9381-3344-4ebc-9aa0-f12ceb9edb2d','{"command":{"invokeId":"219a9381-3344-4ebc-9aa0-f12ceb9edb2d","nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","node":"Demo node","command":"echo to the log; echo to stderr >&2; false","startedAt":1795731224017,"endedAt":1795731224022,"exitCode":1,"output":[["stdout","to the log\n"],["stderr","to stderr\n"]],"stdoutBytes":11,"stderrBytes":10}}');
INSERT INTO "messages" VALUES('122e700f-6a6f-43e1-a275-ee54ee66061c','7a9547d8-ce08-4edf-8a39-06312e820b88','03e5b28f-a9cd-491f-a7dd-57071e8fa024','user',1795731224508,'done',1,'Say something.',NULL,'{}');
INSERT INTO "messages" VALUES('69b717a3-fc85-40ff-987a-f377bd3c384b','7a9547d8-ce08-4edf-8a39-06312e820b88','03e5b28f-a9cd-491f-a7dd-57071e8fa024','command',1795731224513,'done',7,'','5f66db72-c49f-4f9a-a919-0ee26bf77dcb','{"command":{"invokeId":"5f66db72-c49f-4f9a-a919-0ee26bf77dcb","nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","node":"Demo node","command":"echo from the model","approval":{"state":"approved","by":"this machine"},"startedAt":1795731224515,"endedAt":1795731224519,"exitCode":0,"output":[["stdout","from the model\n"]],"stdoutBytes":15,"stderrBytes":0}}');
INSERT INTO "messages" VALUES('7ac3fd90-ad29-46fc-b50c-7c61879f79f3','7a9547d8-ce08-4edf-8a39-06312e820b88','03e5b28f-a9cd-491f-a7dd-57071e8fa024','command',1795731224524,'done',17,'','02e10932-bd66-440f-b905-81913cdf6b4e','{"command":{"invokeId":"02e10932-bd66-440f-b905-81913cdf6b4e","nodeId":"6259ae28-5b20-4cc0-9b8d-8023dbfb47e3","node":"Demo node","command":"sleep 0.3; echo later","background":true,"approval":{"state":"approved","by":"this machine"},"startedAt":1795731224527,"endedAt":1795731224834,"exitCode":0,"output":[["stdout","later\n"]],"stdoutBytes":6,"stderrBytes":0}}');
INSERT INTO "messages" VALUES('8597a94d-2a41-4752-8a2a-3386a92a8b2e','7a9547d8-ce08-4edf-8a39-06312e820b88','03e5b28f-a9cd-491f-a7dd-57071e8fa024','assistant',1795731224533,'done',15,'It says: from the model.',NULL,'{"model":"ollama/llama3.2","usage":{"inputTokens":21,"outputTokens":15}}');
INSERT INTO "messages" VALUES('7ca7e6ea-9cfe-45b4-ab52-b0327dbeb6ee','7a9547d8-ce08-4edf-8a39-06312e820b88','e1bd85c6-4af4-48ef-9606-c22b36ef7b00','user',1795731226485,'done',18,'Again.',NULL,'{}');
INSERT INTO "messages" VALUES('166b476f-9f56-4a8b-b2b4-0d7f3716c7c7','7a9547d8-ce08-4edf-8a39-06312e820b88','e1bd85c6-4af4-48ef-9606-c22b36ef7b00','assistant',1795731226489,'done',21,'Done.',NULL,'{"model":"ollama/llama3.2","usage":{"inputTokens":7,"outputTokens":5}}');
CREATE TABLE operator_keys (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        key_hash TEXT NOT NULL UNIQUE,       -- SHA-256, hex
        scopes TEXT NOT NULL,                -- JSON array
        created_at INTEGER NOT NULL,
        last_used_at INTEGER,
        revoked_at INTEGER
    );
INSERT INTO "operator_keys" VALUES('bf0894b2-4323-4f37-85ad-944527cf2340','this machine','56bae1767b17680b87797c9eeadeab025c96f129105637c485150e170eaa129d','["operator.admin"]',1795731211559,1795731214173,NULL);
INSERT INTO "operator_keys" VALUES('e10e5212-f755-4e79-8ed1-2d870fa8f21d','reader','1ad9961dd48fba7d8e58d813fe7163a1673d576bf908a3f4ff84a448e000eac0','["operator.read"]',1795731220569,NULL,NULL);
INSERT INTO "operator_keys" VALUES('5d5158ba-5e97-491e-89dd-df5322599736','old key','9ea6a7db3f1522379d17061cd6786a22dfcb1faf3fb14fa49417ccdb9b2532f7','["operator.write"]',1795731220990,NULL,1795731221505);
CREATE TABLE sessions (
        key TEXT PRIMARY KEY,
        label TEXT NOT NULL,
        model TEXT NOT NULL,
        node_id TEXT NOT NULL,
        approvals TEXT NOT NULL DEFAULT 'ask',
        archived INTEGER NOT NULL DEFAULT 0,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL,
        seq INTEGER NOT NULL DEFAULT 0,      -- nobody has heard of a higher one
        run_id TEXT NOT NULL DEFAULT ''      -- of the model's turn in progress
    );
INSERT INTO "sessions" VALUES('main','Main','shell','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','ask',0,1795731211569,1795731224015,1025,'');
INSERT INTO "sessions" VALUES('7a9547d8-ce08-4edf-8a39-06312e820b88','with a model','shell','6259ae28-5b20-4cc0-9b8d-8023dbfb47e3','ask',0,1795731224505,1795731226485,1025,'');
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "settings" VALUES('scram_decoy_key','"23ba65c0b622922283959a6886f8771416a7f7a31b87d183f9aba43ef039e06f"');
CREATE TABLE turns (                     -- what a model is told of a session
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        session_key TEXT NOT NULL REFERENCES sessions(key) ON DELETE CASCADE,
        message TEXT NOT NULL                -- JSON
    );
INSERT INTO "turns" VALUES(1,'main','{"role":"user","text":"echo shown in a card","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(2,'main','{"role":"assistant","text":"","tool_calls":[{"id":"2e8c59e20","name":"exec","arguments":{"command":"echo shown in a card"},"malformed":""}],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(3,'main','{"role":"tool","text":"{\"node\":\"Demo node\",\"stdout\":\"shown in a card\\n\",\"stderr\":\"\",\"exit_code\":0,\"duration_ms\":2}","tool_calls":[],"tool_call_id":"2e8c59e20","tool_name":"exec","provider_data":{}}');
INSERT INTO "turns" VALUES(4,'main','{"role":"user","text":"seq 1 90000","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(5,'main','{"role":"assistant","text":"","tool_calls":[{"id":"ee156c031","name":"exec","arguments":{"command":"seq 1 90000"},"malformed":""}],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(6,'main','{"role":"tool","text":"{\"node\":\"Demo node\",\"stdout\":\"1\\n2\\n3\\n4\\n5\\n6\\n7\\n8\\n9\\n10\\n11\\n12\\n13\\n14\\n15\\n16\\n17\\n18\\n19\\n20\",\"stderr\":\"\",\"truncated\":true,\"exit_code\":0,\"duration_ms\":19}","tool_calls":[],"tool_call_id":"ee156c031","tool_name":"exec","provider_data":{}}');
INSERT INTO "turns" VALUES(7,'main','{"role":"user","text":"echo to the log; echo to stderr >&2; false","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(8,'main','{"role":"assistant","text":"","tool_calls":[{"id":"1fbb026ef","name":"exec","arguments":{"command":"echo to the log; echo to stderr >&2; false"},"malformed":""}],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(9,'main','{"role":"tool","text":"{\"node\":\"Demo node\",\"stdout\":\"to the log\\n\",\"stderr\":\"to stderr\\n\",\"exit_code\":1,\"duration_ms\":2}","tool_calls":[],"tool_call_id":"1fbb026ef","tool_name":"exec","provider_data":{}}');
INSERT INTO "turns" VALUES(10,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"user","text":"Say something.","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(11,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"assistant","text":"","tool_calls":[{"id":"4bee3c08e","name":"exec","arguments":{"command":"echo from the model","timeout":20},"malformed":""}],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(12,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"tool","text":"{\"node\":\"Demo node\",\"stdout\":\"from the model\\n\",\"stderr\":\"\",\"exit_code\":0,\"duration_ms\":2}","tool_calls":[],"tool_call_id":"4bee3c08e","tool_name":"exec","provider_data":{}}');
INSERT INTO "turns" VALUES(13,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"assistant","text":"","tool_calls":[{"id":"778cab216","name":"exec","arguments":{"command":"sleep 0.3; echo later","background":true},"malformed":""}],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(14,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"tool","text":"{\"node\":\"Demo node\",\"id\":\"02e10932-bd66-440f-b905-81913cdf6b4e\",\"state\":\"started\"}","tool_calls":[],"tool_call_id":"778cab216","tool_name":"exec","provider_data":{}}');
INSERT INTO "turns" VALUES(15,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"assistant","text":"It says: from the model.","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(16,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"user","text":"Again.","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
INSERT INTO "turns" VALUES(17,'7a9547d8-ce08-4edf-8a39-06312e820b88','{"role":"assistant","text":"Done.","tool_calls":[],"tool_call_id":"","tool_name":"","provider_data":{}}');
CREATE UNIQUE INDEX devices_node_id ON devices(node_id) WHERE revoked_at IS NULL;
CREATE INDEX commands_node ON commands(node_id, seq);
CREATE INDEX commands_state ON commands(state, seq);
CREATE INDEX commands_asked_at ON commands(asked_at);
CREATE UNIQUE INDEX messages_order ON messages(session_key, created_at);
CREATE INDEX messages_seq ON messages(session_key, seq);
CREATE INDEX messages_open ON messages(state) WHERE state IN ('running', 'queued');
CREATE INDEX turns_session ON turns(session_key, id);
CREATE INDEX audit_at ON audit(at);
CREATE INDEX audit_event ON audit(event, address, at);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('audit',8);
INSERT INTO "sqlite_sequence" VALUES('commands',13);
INSERT INTO "sqlite_sequence" VALUES('turns',17);
COMMIT;
PRAGMA user_version = 4;
