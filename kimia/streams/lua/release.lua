-- Give an unfinished turn to another worker, before all that wait; it does not count as an attempt.
-- KEYS   1 head; 2 job stream of the claim; 3 handover stream of the stage
-- ARGV   turn id, consumer, token, entry, stage
-- answer 1 | 0: it was not mine any more, or has ended
local turn, consumer, token, entry, stage = unpack(ARGV)
local s = function(name) return stage .. ':' .. name end
local h = fields(KEYS[1], 'state', s'consumer', s'token', s'done')
if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end
ack(KEYS[2], entry)
if not h[1] or over(h[1]) or h[4] then return 0 end
redis.call('HDEL', KEYS[1], s'consumer', s'token', s'lease', s'worker')
if redis.call('HINCRBY', KEYS[1], s'tries', -1) < 0 then redis.call('HSET', KEYS[1], s'tries', 0) end
queue(KEYS[1], KEYS[3], stage, turn)
return 1
