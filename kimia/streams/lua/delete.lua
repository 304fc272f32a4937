-- Delete a session and its turns for good. What is late finds no head, or the tombstone.
-- KEYS   1 session; 2 its turns; 3 its blobs; 4 its tombstone
-- ARGV   ttl of the tombstone (ms)
-- answer {gone} | {deleted, blobs...}
local turns, blobs = redis.call('SMEMBERS', KEYS[2]), redis.call('SMEMBERS', KEYS[3])
if redis.call('EXISTS', KEYS[1]) == 0 and #turns == 0 then return {'gone'} end
redis.call('SET', KEYS[4], 1, 'PX', ARGV[1])
for _, turn in ipairs(turns) do
  local head = P .. ':turn:' .. turn
  local h = fields(head, 'state', 'idem', 'ttl', 'llm:consumer')
  if h[1] then
    point(h[4], turn, 'gone', 0, h[3]) -- it may keep something of the conversation for the next turn
    notify(head, turn, h[3])
  end
  if h[2] then redis.call('UNLINK', h[2]) end
  redis.call('UNLINK', head, head .. ':input', head .. ':encoded', head .. ':tokens', head .. ':audio')
end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
table.insert(blobs, 1, 'deleted')
return blobs
