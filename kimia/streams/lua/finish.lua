-- End a turn: cancelled or error. Only the first terminal state counts.
-- KEYS   1-6 the turn's; 7 job stream, if a worker says so
-- ARGV   turn id, state, failure (''), and if a worker says so: consumer, token, entry, stage
-- answer ended | over (it had ended) | gone | fenced
local turn, state, failure, consumer, token, entry, stage = unpack(ARGV)

local h = fields(KEYS[1], 'state', 'ttl', (stage or '') .. ':consumer', (stage or '') .. ':token')
if h[1] and stage and (h[3] ~= consumer or h[4] ~= token) then return 'fenced' end
if stage then ack(KEYS[7], entry) end
if not h[1] then return 'gone' end
if over(h[1]) then return 'over' end
finish(turn, state, failure, h[2])
return 'ended'
