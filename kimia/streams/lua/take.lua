-- Take jobs that nobody has had, stream after stream in the order given, never more than wanted.
-- KEYS   job streams of one stage
-- ARGV   consumer, how many, ttl of a worker's own stream (ms)
-- answer per stream {id to wait behind, {{entry id, fields}, ...}}; the id is 0-0 where more may lie
local consumer, wanted, ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local answer = {}
for i, stream in ipairs(KEYS) do
  local entries, tail = {}, '0-0'
  if wanted > 0 then
    local got = grouped(stream, 'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', wanted, 'STREAMS', stream, '>')
    entries = got and got[1][2] or {}
    wanted = wanted - #entries
  end
  if wanted > 0 then
    local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
    tail = last[1] and last[1][1] or tail
  end
  if string.find(stream, ':@', 1, true) then redis.call('PEXPIRE', stream, ttl) end
  answer[i] = {tail, entries}
end
return answer
