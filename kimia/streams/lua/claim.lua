-- Make a job that was just delivered to a consumer its own, if the turn still wants it.
-- KEYS   1-6 the turn's; 7 job stream that delivered it; 8 counter of tokens; 9 dead letters
-- ARGV   turn id, consumer, entry, stage, log it writes, lease (ms), claims allowed without a new chunk,
--        failure for giving up, failure for a deadline, how long a turn is left to the worker that it would like (ms)
-- answer {claimed, token, spec, tries, next index, rewound, us waited, job stream, entry[, ms heard, ms since then]}
--        | {lost} (delivered to another since) | {over} (dropped) | {stale} (dropped: replaced or done)
--        | {held} (another claim lives: the job was handed to its owner)
--        | {later, us} (it is left to the worker that it would like for so long: then claim it again, without patience)
local turn, consumer, entry, stage, log, lease, most, gave_up, too_late, patience = unpack(ARGV)
local head, stream = KEYS[1], KEYS[7]

local mine = redis.call('XPENDING', stream, GROUP, entry, entry, 1)[1]
if not mine or mine[2] ~= consumer then return {'lost'} end

local s = function(name) return stage .. ':' .. name end
local h = fields(head, 'state', 'turn', s'consumer', s'lease', s'done', s'stream', s'entry', s'queued', s'claimed',
  log .. ':next', 'deadline', 'rewound', 'ttl', 'heard', 'heard_at', s'worker')
local owner, ends, ttl = h[3], tonumber(h[4] or 0), h[13]
local next, deadline = tonumber(h[10] or 0), tonumber(h[11] or 0)
local now = clock()
if not h[1] or over(h[1]) then
  ack(stream, entry)
  return {'over'}
end

local copy = string.find(stream, ':@', 1, true)
if copy then ack(stream, entry) end
if h[5] or not h[7] or not (copy or (stream == h[6] and entry == h[7])) then
  ack(stream, entry)
  return {'stale'}
end
if owner and ends > now then
  -- The claim came by the worker's copy, or the worker woke up. Its silence is counted from its last heartbeat.
  if not copy and owner ~= consumer then
    local heard = math.floor(ends / 1000) - lease
    redis.call('XCLAIM', stream, GROUP, owner, 0, entry, 'TIME', heard, 'JUSTID')
  end
  return {'held'}
end

-- The worker that the turn would like has a row left, or is about to claim the copy that it took for its last one.
local function awaited(own)
  local taken = redis.pcall('XPENDING', own, GROUP)
  return redis.call('EXISTS', own .. ':free') == 1 or (not taken.err and taken[1] > 0)
end
local left = (h[8] or 0) + patience * 1000 - now
if left > 0 and not h[9] and not copy and h[16] and h[16] ~= consumer
  and awaited(P .. ':jobs:' .. stage .. ':@' .. h[16]) then
  return {'later', left}
end

stream, entry = h[6], h[7]
-- A turn that has begun to speak is not dropped when it changes hands.
if deadline > 0 and now > deadline and next == 0 then
  ack(stream, entry)
  finish(turn, 'error', too_late, ttl)
  return {'over'}
end
local tries = redis.call('HINCRBY', head, s'tries', 1)
if tries > tonumber(most) then
  local who = fields(head, 'tenant', 'key', 'trace')
  redis.call('XADD', KEYS[9], 'MAXLEN', '~', 10000, '*', 't', turn, 'o', who[1], 'k', who[2], 'trace', who[3] or '',
    'reason', 'GAVE_UP', 'tries', tries - 1, 'consumer', owner or '', 'next', next)
  redis.call('PEXPIRE', KEYS[9], 7 * 86400000)
  ack(stream, entry)
  finish(turn, 'error', gave_up, ttl)
  return {'over'}
end

local token = new_token(KEYS[8])
redis.call('HSET', head, s'consumer', consumer, s'token', token, s'lease', now + lease * 1000)
redis.call('XCLAIM', stream, GROUP, consumer, 0, entry, 'JUSTID')
local waited = 0
if redis.call('HSETNX', head, s'claimed', now) == 1 then
  waited = now - h[8]
else
  redis.call('HINCRBY', head, s'take_overs', 1)
end
renew_turn(ttl)
local answer = {'claimed', token, h[2], tries, next, h[12] and 1 or 0, waited, stream, entry}
if h[14] then
  answer[10], answer[11] = tonumber(h[14]), math.floor((now - h[15]) / 1000)
end
return answer
