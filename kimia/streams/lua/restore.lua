-- Write a session's record as it was, where the server has an older one or none: a fail-over has lost it.
-- KEYS   1 session; 2 its turns; 3 its blobs; 4 its tombstone
-- ARGV   version that it had, record, ttl (ms), blobs it names...
-- answer {restored} | {newer} (also when it is there) | {gone}
local version, record, ttl = tonumber(ARGV[1]), ARGV[2], ARGV[3]
if redis.call('EXISTS', KEYS[4]) == 1 then return {'gone'} end
if tonumber(redis.call('HGET', KEYS[1], 'version') or 0) >= version then return {'newer'} end
redis.call('HSET', KEYS[1], 'record', record, 'version', version)
for i = 4, #ARGV do redis.call('SADD', KEYS[3], ARGV[i]) end
for i = 1, 3 do renew(KEYS[i], ttl) end
return {'restored'}
