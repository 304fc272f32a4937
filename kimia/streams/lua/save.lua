-- Write a session's record, if nobody has written since it was read.
-- KEYS   1 session; 2 its turns; 3 its blobs; 4 its tombstone; 5... input logs of its turns
-- ARGV   version that was read (0: it must not exist), record, ttl (ms), blobs it names...
-- answer {saved, new version} (also when the same was saved before) | {conflict, version} | {gone}
local version, record, ttl = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local found = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if redis.call('EXISTS', KEYS[4]) == 1 or (found == 0 and version > 0) then return {'gone'} end
if found == version + 1 and redis.call('HGET', KEYS[1], 'record') == record then return {'saved', found} end
if found ~= version then return {'conflict', found} end
redis.call('HSET', KEYS[1], 'record', record, 'version', version + 1)
for i = 4, #ARGV do redis.call('SADD', KEYS[3], ARGV[i]) end
for i, key in ipairs(KEYS) do
  if i ~= 4 then renew(key, ttl) end
end
return {'saved', version + 1}
