-- Note how far the caller has heard a turn, and say so to the workers that pace themselves by it. The furthest position
-- counts, and of equal ones the latest: a player that stands still. So it matters neither who says it nor in which order.
-- KEYS   1 head
-- ARGV   turn id[, milliseconds of speech heard, milliseconds since then]
-- answer {milliseconds heard, milliseconds since then} | {}: nothing is known of it, or it does not run
local turn, heard, age = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local h = fields(KEYS[1], 'state', 'heard', 'heard_at', 'ttl', 'llm:consumer', 'detokenizer:consumer')
if h[1] ~= 'running' then return {} end
local before, at, now = tonumber(h[2]), tonumber(h[3]), clock()
if heard and (not before or heard > before or (heard == before and now - age * 1000 > at)) then
  before, at = heard, now - age * 1000
  redis.call('HSET', KEYS[1], 'heard', before, 'heard_at', at)
  point(h[5], turn, 'playback', before, h[4])
  if h[6] ~= h[5] then point(h[6], turn, 'playback', before, h[4]) end
end
return before and {before, math.floor((now - at) / 1000)} or {}
