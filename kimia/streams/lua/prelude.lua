-- Functions that all scripts share; the file is put before each of them.
--
-- KEYS[1] of every script carries the partition's tag. Scripts about a turn get its six keys first:
-- KEYS[1] head, KEYS[2..5] logs input, encoded, tokens, audio, KEYS[6] the session's set of turns.
-- Keys that depend on what a head says (inboxes of its owners, a worker's own jobs) are made here, under the same tag.
-- Times are microseconds of this server's clock, so that all times of a turn are of one clock.

local P = string.match(KEYS[1], '^%b{}')
local GROUP = 'workers'
local INBOX_LENGTH = 10000
local FORGOTTEN_AT_ONCE = 64
local LOGS = {input = 2, encoded = 3, tokens = 4, audio = 5}

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- A token that no claim or reader has had, not even one that a fail-over has forgotten: the clock goes on.
local function new_token(counter)
  local token = math.max(redis.call('INCR', counter), clock())
  redis.call('SET', counter, token)
  return token
end

local function fields(key, ...)
  return redis.call('HMGET', key, ...)
end

-- A table by name from the flat list that XINFO gives.
local function record(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

-- Let a key live at least `ttl` ms from now; what lives longer is left alone.
local function renew(key, ttl)
  if redis.call('PTTL', key) < tonumber(ttl) then redis.call('PEXPIRE', key, ttl) end
end

local function renew_turn(ttl)
  for i = 1, 6 do renew(KEYS[i], ttl) end
end

-- Take turns of which nothing is left out of a session's set, whenever it has grown by so many: it names what a
-- deletion must find, and a long call has no end of turns.
local function forget_expired(set)
  if redis.call('SCARD', set) % FORGOTTEN_AT_ONCE > 0 then return end
  for _, turn in ipairs(redis.call('SMEMBERS', set)) do
    local head = P .. ':turn:' .. turn
    if redis.call('EXISTS', head, head .. ':input', head .. ':encoded', head .. ':tokens', head .. ':audio') == 0 then
      redis.call('SREM', set, turn)
    end
  end
end

local function over(state)
  return state ~= 'open' and state ~= 'running'
end

-- Tell a process that something is new: log `name` of the turn now goes up to `next`.
local function point(owner, turn, name, next, ttl)
  if not owner or owner == '' then return end
  local inbox = P .. ':inbox:' .. owner
  redis.call('XADD', inbox, 'MAXLEN', '~', INBOX_LENGTH, '*', 't', turn, 'l', name, 'n', next)
  renew(inbox, ttl)
end

-- Tell the reader and every worker that has claimed a stage that the state changed.
local function notify(head, turn, ttl)
  local owners = fields(head, 'reader', 'tokenizer:consumer', 'llm:consumer', 'detokenizer:consumer')
  local told = {}
  for i = 1, 4 do
    if owners[i] and not told[owners[i]] then
      told[owners[i]] = true
      point(owners[i], turn, 'state', 0, ttl)
    end
  end
end

-- Whether every stage that was queued has written its final chunk.
local function all_done(head)
  for _, stage in ipairs({'tokenizer', 'llm', 'detokenizer'}) do
    local h = fields(head, stage .. ':queued', stage .. ':done')
    if h[1] and not h[2] then return false end
  end
  return true
end

-- Set the one terminal state. The caller has seen that there is none yet.
local function finish(turn, state, failure, ttl)
  redis.call('HSET', KEYS[1], 'state', state, 'ended', clock())
  if failure ~= '' then redis.call('HSET', KEYS[1], 'failure', failure) end
  notify(KEYS[1], turn, ttl)
  renew_turn(ttl)
end

-- Acknowledge a job, and trim the stream up to the oldest entry that is pending or not delivered. The last entry
-- delivered stays, so that a stream always has a tail to wait behind.
local function ack(stream, entry)
  if redis.call('XACK', stream, GROUP, entry) == 0 then return end
  local oldest = redis.call('XPENDING', stream, GROUP)[2]
  local group = record(redis.call('XINFO', 'GROUPS', stream)[1])
  redis.call('XTRIM', stream, 'MINID', oldest or group['last-delivered-id'])
end

-- Put a turn before the workers of a stage: the entry in the class stream is the recovery record. A worker that has
-- what the turn needs gets a copy, as long as it lives (its own stream is renewed by it alone).
local function queue(head, stream, stage, turn)
  local h = fields(head, 'tenant', 'key', stage .. ':worker')
  local entry = redis.call('XADD', stream, '*', 't', turn, 'o', h[1], 'k', h[2])
  redis.call('HSET', head, stage .. ':stream', stream, stage .. ':entry', entry)
  redis.call('HSETNX', head, stage .. ':queued', clock())
  local own = h[3] and P .. ':jobs:' .. stage .. ':@' .. h[3]
  if own and redis.call('EXISTS', own) == 1 then
    redis.call('XADD', own, '*', 't', turn, 'o', h[1], 'k', h[2])
  end
end

-- Run a command on a stream that may lack its group (a new worker, a fail-over): make the group and try again.
local function grouped(stream, ...)
  local answer = redis.pcall(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not string.find(answer.err, 'NOGROUP', 1, true) then error(answer) end
  redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  return redis.call(...)
end
