-- Open a turn, or find the one that the same request has opened.
-- KEYS   1-6 the turn's; 7 tombstone of the session; 8 counter of reader tokens; 9 idempotency key, if there is one
-- ARGV   turn id, spec, reader, session, tenant, key id, ttl of a turn (ms), ttl of a session (ms), traceparent
-- answer {gone} | {opened, turn id, token} | {existing, turn id, token; 0 where somebody else reads it}
local turn, spec, reader, session, tenant, key, ttl, session_ttl, trace = unpack(ARGV)
local idem = KEYS[9]

if redis.call('EXISTS', KEYS[7]) == 1 then return {'gone'} end
for _, id in ipairs({idem and redis.call('GET', idem) or turn, turn}) do
  local old = fields(P .. ':turn:' .. id, 'reader', 'reader_token')
  if old[2] then return {'existing', id, old[1] == reader and tonumber(old[2]) or 0} end
end

local token = new_token(KEYS[8])
redis.call('HSET', KEYS[1], 'state', 'open', 'turn', spec, 'reader', reader, 'reader_token', token, 'session', session,
  'tenant', tenant, 'key', key, 'trace', trace, 'ttl', ttl, 'opened', clock())
-- A head that is made again after a fail-over goes on with the logs that were left.
for name, i in pairs(LOGS) do
  local last = redis.call('XREVRANGE', KEYS[i], '+', '-', 'COUNT', 1)[1]
  if last then redis.call('HSET', KEYS[1], name .. ':next', string.match(last[1], '^%d+')) end
end
redis.call('SADD', KEYS[6], turn)
forget_expired(KEYS[6])
renew_turn(ttl)
if idem then
  redis.call('SET', idem, turn, 'PX', ttl + session_ttl)
  redis.call('HSET', KEYS[1], 'idem', idem)
end
return {'opened', turn, token}
