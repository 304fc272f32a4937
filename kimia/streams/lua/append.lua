-- Append the caller's input. Chunks that are there already are skipped, whatever they hold.
-- KEYS   1-6 the turn's
-- ARGV   turn id, reader token, index of the first chunk, stage that reads the input, chunks...
-- answer {ok | gone | fenced | gap | cancelled | error | done, next index}
local turn, token, index, stage = unpack(ARGV, 1, 4)

local h = fields(KEYS[1], 'state', 'reader_token', 'input:next', 'ttl', stage .. ':consumer')
local next = tonumber(h[3] or 0)
index = tonumber(index)
if not h[1] then return {'gone', 0} end
if h[2] ~= token then return {'fenced', next} end
if over(h[1]) then return {h[1], next} end
if index > next then return {'gap', next} end

for i = 5, #ARGV do
  if index == next then
    next = next + 1
    redis.call('XADD', KEYS[2], next .. '-0', 'c', ARGV[i])
  end
  index = index + 1
end
redis.call('HSET', KEYS[1], 'input:next', next)
point(h[5], turn, 'input', next, h[4])
renew_turn(h[4])
return {'ok', next}
