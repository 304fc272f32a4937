-- Name blobs of a turn that is not submitted yet, so that the deletion of its session finds them.
-- KEYS   1-6 the turn's; 7 the session's set of blobs
-- ARGV   blobs...
-- answer 1 | 0: the turn is gone, and nobody would find them
local ttl = fields(KEYS[1], 'ttl')[1]
if not ttl then return 0 end
redis.call('SADD', KEYS[7], unpack(ARGV))
renew(KEYS[7], ttl)
return 1
