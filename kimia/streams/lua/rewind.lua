-- The features of a turn are gone: put it back to the tokenizer, which submits the llm again with its final chunk.
-- KEYS   1 head; 2 job stream of the llm's claim; 3 handover stream of the tokenizer
-- ARGV   turn id, consumer, token, entry
-- answer 1 | 0: it was not mine any more, is done, or has ended
local turn, consumer, token, entry = unpack(ARGV)
local h = fields(KEYS[1], 'state', 'llm:consumer', 'llm:token', 'llm:done')
if h[1] and (h[2] ~= consumer or h[3] ~= token) then return 0 end
ack(KEYS[2], entry)
if not h[1] or over(h[1]) or h[4] then return 0 end
for _, stage in ipairs({'tokenizer', 'llm'}) do
  redis.call('HDEL', KEYS[1], stage .. ':consumer', stage .. ':token', stage .. ':lease', stage .. ':stream',
    stage .. ':entry', stage .. ':queued', stage .. ':claimed', stage .. ':done')
end
redis.call('HSET', KEYS[1], 'rewound', 1)
queue(KEYS[1], KEYS[3], 'tokenizer', turn)
return 1
