-- Forget consumers that hold nothing; a worker that leaves also takes its own job stream along.
-- KEYS   job streams of one stage
-- ARGV   consumers...
-- answer how many consumers were deleted
local deleted = 0
for _, stream in ipairs(KEYS) do
  for _, consumer in ipairs(ARGV) do
    local held = redis.pcall('XPENDING', stream, GROUP, '-', '+', 1, consumer)
    if not held.err and #held == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, consumer)
      deleted = deleted + 1
    end
    if string.sub(stream, -#consumer - 2) == ':@' .. consumer then redis.call('UNLINK', stream, stream .. ':free') end
  end
end
return deleted
