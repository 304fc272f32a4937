-- A worker says how many rows it has; or, with a life of 0, that it has none any more.
-- KEYS workers hash of the stage, [number of partitions]
-- ARGV worker, rows, used, life in milliseconds, [partitions: said again where the journal has lost them]
-- answer: nothing; or a live worker with another mark, which is what stands behind a + in a name: then nothing is counted
local worker, life = ARGV[1], tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function mark(name) return string.match(name, '%+(%w+)') or '' end
local found = redis.call('HGETALL', KEYS[1])
for i = 1, #found, 2 do
  if tonumber(string.match(found[i + 1], '(%d+)$')) <= now then
    redis.call('HDEL', KEYS[1], found[i])
  elseif life > 0 and mark(found[i]) ~= mark(worker) then
    return found[i]
  end
end
if life > 0 then
  redis.call('SET', KEYS[2], ARGV[5], 'NX')
  redis.call('HSET', KEYS[1], worker, string.format('%d %d %d', ARGV[2], ARGV[3], now + life))
else
  redis.call('HDEL', KEYS[1], worker)
end
