-- Let a reservation last longer; or, with a life of 0, give it back, which counts as a release. What is given back by
-- one of its holders lasts for the others.
-- KEYS hash of the session's reservation
-- ARGV prefix of the ledger's keys, session, life in milliseconds, window of the release rate in milliseconds, [holder]
-- answer: 1, or 0 when the session holds no reservation
local prefix, session = ARGV[1], ARGV[2]
local life, window = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = redis.call('HMGET', KEYS[1], 'tenant', 'stages')
if not held[1] then return 0 end
local pools = { '@' .. held[1] }
-- The hash may outlive the reservation by a moment: the set of its tenant says whether it has ended.
local ends = redis.call('ZSCORE', prefix .. 'reserved:' .. pools[1], session)
if life > 0 and not (ends and tonumber(ends) > now) then return 0 end
local holder = ARGV[5] and 'held:' .. ARGV[5]
if holder and life > 0 then redis.call('HSET', KEYS[1], holder, now + life) end
if holder and life == 0 then
  redis.call('HDEL', KEYS[1], holder)
  local left = redis.call('HGETALL', KEYS[1])
  for i = 1, #left, 2 do
    if string.find(left[i], '^held:') and tonumber(left[i + 1]) > now then return 1 end
  end
end
for stage in string.gmatch(held[2], '%S+') do pools[#pools + 1] = stage end
for _, pool in ipairs(pools) do
  local reserved, released = prefix .. 'reserved:' .. pool, prefix .. 'released:' .. pool
  local over = tonumber(redis.call('ZSCORE', reserved, session))
  if life > 0 then
    redis.call('ZADD', reserved, now + life, session)
    redis.call('PEXPIRE', reserved, math.max(life, redis.call('PTTL', reserved)))
  elseif over then -- one whose time was over already was released then
    redis.call('ZREM', reserved, session)
    redis.call('ZADD', released, math.min(over, now), session .. ':' .. time[1] .. ':' .. time[2])
    redis.call('PEXPIRE', released, window)
  end
end
if life > 0 then redis.call('PEXPIRE', KEYS[1], life) else redis.call('DEL', KEYS[1]) end
return 1
