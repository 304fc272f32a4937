-- Say that a claim lives. The head decides whose it is; only its owner takes the job's entry back.
-- KEYS   1 head; 2 job stream
-- ARGV   consumer, token, entry, stage, lease (ms)
-- answer 1 | 0: lost, ended or gone
local consumer, token, entry, stage, lease = unpack(ARGV)
local h = fields(KEYS[1], 'state', stage .. ':consumer', stage .. ':token')
if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end
if not h[1] or over(h[1]) then
  ack(KEYS[2], entry)
  return 0
end
redis.call('HSET', KEYS[1], stage .. ':lease', clock() + lease * 1000)
redis.call('XCLAIM', KEYS[2], GROUP, consumer, 0, entry, 'JUSTID')
return 1
