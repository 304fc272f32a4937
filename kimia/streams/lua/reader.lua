-- Make another process the reader of a turn; the old reader's token ends.
-- KEYS   1-6 the turn's; 7 counter of reader tokens
-- ARGV   reader
-- answer new token | 0: no such turn
local ttl = redis.call('HGET', KEYS[1], 'ttl')
if not ttl then return 0 end
local token = new_token(KEYS[7])
redis.call('HSET', KEYS[1], 'reader', ARGV[1], 'reader_token', token)
renew_turn(ttl)
return token
