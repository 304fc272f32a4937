-- Reserve a row in every stage of a route for a session, or in none of them. What the session holds already is renewed;
-- new stages are added to it. Nothing changes when it is refused.
-- KEYS hash of the session's reservation
-- ARGV prefix of the ledger's keys, session, tenant, life in milliseconds, tenant's limit (-1: none),
--      window of the release rate in milliseconds, holder, stages ...
-- answer: 'ok' | {'full', stage, capacity, releases wanted, releases in the window} | {'tenant', '', limit, ...};
--         so many must give their place back before there is one for this session
local prefix, session, tenant = ARGV[1], ARGV[2], ARGV[3]
local life, limit, window = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Who holds a place in a pool (a stage's or a tenant's rows), without those whose time is over: they count as releases
-- of the moment at which it was.
local function holders(pool)
  local reserved, released = prefix .. 'reserved:' .. pool, prefix .. 'released:' .. pool
  local gone = redis.call('ZRANGEBYSCORE', reserved, '-inf', now, 'WITHSCORES')
  for i = 1, #gone, 2 do
    redis.call('ZADD', released, gone[i + 1], gone[i] .. ':' .. gone[i + 1])
    redis.call('PEXPIRE', released, window)
  end
  redis.call('ZREMRANGEBYSCORE', reserved, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', released, '-inf', now - window)
  return redis.call('ZCARD', reserved)
end

-- A place whose time is over is not held, even if nobody has taken it out of the set yet.
local function holds(pool)
  local ends = redis.call('ZSCORE', prefix .. 'reserved:' .. pool, session)
  return ends and tonumber(ends) > now
end

local function refusal(word, name, pool, size, count)
  return { word, name, size, count - size + 1, redis.call('ZCARD', prefix .. 'released:' .. pool) }
end

local function capacity(stage)
  local rows = 0
  local found = redis.call('HVALS', prefix .. 'workers:' .. stage)
  for _, worker in ipairs(found) do
    local count, ends = string.match(worker, '^(%d+) %d+ (%d+)$')
    if tonumber(ends) > now then rows = rows + tonumber(count) end
  end
  return rows
end

local held = redis.call('HMGET', KEYS[1], 'tenant', 'stages')
tenant = held[1] or tenant
local account = '@' .. tenant
local count = holders(account)
if limit >= 0 and count >= limit and not holds(account) then
  return refusal('tenant', '', account, limit, count)
end
local pools, seen = { account }, {}
for i = 8, #ARGV do
  local stage = ARGV[i]
  local reserved, rows = holders(stage), capacity(stage)
  if reserved >= rows and not holds(stage) then
    return refusal('full', stage, stage, rows, reserved)
  end
  seen[stage] = true
  pools[#pools + 1] = stage
end
for stage in string.gmatch(held[2] or '', '%S+') do
  if not seen[stage] and holds(stage) then pools[#pools + 1] = stage end
end
for _, pool in ipairs(pools) do
  local key = prefix .. 'reserved:' .. pool
  redis.call('ZADD', key, now + life, session)
  redis.call('PEXPIRE', key, math.max(life, redis.call('PTTL', key)))
end
table.remove(pools, 1)
redis.call('HSET', KEYS[1], 'tenant', tenant, 'stages', table.concat(pools, ' '), 'held:' .. ARGV[7], now + life)
redis.call('PEXPIRE', KEYS[1], life)
return 'ok'
