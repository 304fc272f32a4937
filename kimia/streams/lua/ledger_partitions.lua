-- How many partitions the journal is used with: what whoever came first has said.
-- KEYS key of the number
-- ARGV nothing, to ask alone; or the number of somebody who comes
-- answer: the number that holds; nothing where it was asked alone and nobody has come
if ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'NX') end
return redis.call('GET', KEYS[1])
