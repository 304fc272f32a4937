-- Write a turn's final spec and queue its first stage.
-- KEYS   1-6 the turn's; 7 job stream of the first stage
-- ARGV   turn id, reader token, spec, first stage, time until the deadline (us; '': none), llm worker that it would
--        like ('': any)
-- answer ok (also when it was submitted before) | gone | fenced | cancelled | error | done
local turn, token, spec, stage, left, worker = unpack(ARGV)

local h = fields(KEYS[1], 'state', 'reader_token', 'ttl')
if not h[1] then return 'gone' end
if h[2] ~= token then return 'fenced' end
if h[1] == 'running' then return 'ok' end
if over(h[1]) then return h[1] end

local now = clock()
-- Of this server's clock, which claims look at: nobody else's has to agree with it.
local deadline = left == '' and 0 or math.max(1, now + left)
redis.call('HSET', KEYS[1], 'state', 'running', 'turn', spec, 'submitted', now, 'deadline', deadline)
if worker ~= '' then redis.call('HSET', KEYS[1], 'llm:worker', worker) end
queue(KEYS[1], KEYS[7], stage, turn)
-- While it may wait for a worker, it must not be forgotten.
renew_turn(h[3] + math.floor(math.max(0, deadline - now) / 1000))
return 'ok'
