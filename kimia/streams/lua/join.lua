-- Make the groups of job streams, and forget consumers that died long ago and hold nothing.
-- KEYS   job streams of one stage
-- ARGV   ttl of a worker's own stream (ms), silence after which a consumer is forgotten (ms)
-- answer how many consumers were forgotten
local forgotten = 0
for _, stream in ipairs(KEYS) do
  local made = redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then error(made) end
  if string.find(stream, ':@', 1, true) then redis.call('PEXPIRE', stream, ARGV[1]) end
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, GROUP)) do
    local consumer = record(flat)
    if consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer.name)
      forgotten = forgotten + 1
    end
  end
end
return forgotten
