-- Write a chunk of a stage's log: fenced by the claim, checked by its index, and with all that follows from it.
-- KEYS   1-6 the turn's; 7 job stream of the claim; 8 the session's set of blobs; 9 job stream of the next stage, if any
-- ARGV   turn id, consumer, token, entry, stage, log, index, final (0|1), chunk, next stage ('': this is the last),
--        1 if the next stage starts at the first chunk, 0 if at the final one; blob that the chunk names ('')
-- answer {written | duplicate | gap | fenced | gone | cancelled, next index}
local turn, consumer, token, entry, stage, log, index, final, chunk, after, early, blob = unpack(ARGV)
local head = KEYS[1]

local h = fields(head, 'state', stage .. ':consumer', stage .. ':token', log .. ':next', 'ttl', 'reader',
  after .. ':queued', after .. ':consumer')
if not h[1] then
  ack(KEYS[7], entry)
  return {'gone', 0}
end
local next, ttl = tonumber(h[4] or 0), h[5]
index, final = tonumber(index), final == '1'
if h[2] ~= consumer or h[3] ~= token then return {'fenced', next} end
if over(h[1]) then
  ack(KEYS[7], entry)
  return {h[1] == 'done' and index < next and 'duplicate' or 'cancelled', next}
end
if index > next then return {'gap', next} end

local new = index == next
if new then
  next = next + 1
  redis.call('XADD', KEYS[LOGS[log]], next .. '-0', 'c', chunk)
  redis.call('HSET', head, log .. ':next', next, stage .. ':tries', 0)
  redis.call('HSETNX', head, stage .. ':first', clock())
  if log == 'tokens' or log == 'audio' then point(h[6], turn, log, next, ttl) end
  if after ~= '' then point(h[8], turn, log, next, ttl) end
end
if blob ~= '' then
  redis.call('SADD', KEYS[8], blob)
  renew(KEYS[8], ttl)
end
if final then
  ack(KEYS[7], entry)
  redis.call('HSETNX', head, stage .. ':done', clock())
end
if after ~= '' and (final or early == '1') and not h[7] then queue(head, KEYS[9], after, turn) end
-- Mostly with the last stage's; where a fail-over took back what that stage had read, when it is there again.
if final and all_done(head) then finish(turn, 'done', '', ttl) end
renew_turn(ttl)
return {new and 'written' or 'duplicate', next}
