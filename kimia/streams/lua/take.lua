-- Take jobs that nobody has had, stream after stream in the order given, never more than wanted.
-- KEYS   job streams of one stage
-- ARGV   consumer, how many, ttl of a worker's own stream (ms), how long it counts as
--        free after this (ms), [the stream of which nothing is taken but the oldest
--        entry, and that only if it has waited for so long (ms)]
-- answer per stream {id to wait behind, {{entry id, fields}, ...}}; the id is 0-0 where more may lie
local consumer, wanted, ttl, free_for, patient, age = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], ARGV[6]

-- How many entries of a stream may be taken now.
local function limit(stream)
  if stream ~= patient or wanted == 0 then return wanted end
  local known = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'GROUPS', stream)[1]
  local last = known and record(known)['last-delivered-id'] or '0-0'
  local oldest = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
  return oldest and clock() / 1000 - string.match(oldest[1], '^%d+') >= tonumber(age) and 1 or 0
end

local answer, own = {}, nil
for i, stream in ipairs(KEYS) do
  local entries, tail = {}, '0-0'
  local most = limit(stream)
  if most > 0 then
    local got = grouped(stream, 'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', most, 'STREAMS', stream, '>')
    entries = got and got[1][2] or {}
    wanted = wanted - #entries
  end
  if wanted > 0 and stream ~= patient then
    local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)
    tail = last[1] and last[1][1] or tail
  end
  if string.find(stream, ':@', 1, true) then
    own = stream
    redis.call('PEXPIRE', stream, ttl)
  end
  answer[i] = {tail, entries}
end
-- Turns that would like this worker are left to it for a moment while it has a row for them.
if own and wanted > 0 then
  redis.call('SET', own .. ':free', wanted, 'PX', free_for)
elseif own then
  redis.call('UNLINK', own .. ':free')
end
return answer
