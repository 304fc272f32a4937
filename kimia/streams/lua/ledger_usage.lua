-- Live workers and reserved rows of some stages.
-- KEYS for each stage: its workers hash, its reservations
-- ARGV nothing
-- answer: for each stage {reserved, worker, rows, used, worker, rows, used, ...}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for i = 1, #KEYS, 2 do
  local stage = { redis.call('ZCOUNT', KEYS[i + 1], '(' .. now, '+inf') }
  local found = redis.call('HGETALL', KEYS[i])
  for j = 1, #found, 2 do
    local rows, used, ends = string.match(found[j + 1], '^(%d+) (%d+) (%d+)$')
    if tonumber(ends) > now then
      stage[#stage + 1] = found[j]
      stage[#stage + 1] = tonumber(rows)
      stage[#stage + 1] = tonumber(used)
    end
  end
  answer[#answer + 1] = stage
end
return answer
