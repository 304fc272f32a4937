-- How much work a stage has.
-- KEYS   job streams of one stage
-- ARGV   none
-- answer {jobs that nobody has had, jobs that workers hold}
local waiting, pending = 0, 0
for _, stream in ipairs(KEYS) do
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if not groups.err and groups[1] then
    local group = record(groups[1])
    local last = group['last-delivered-id']
    waiting = waiting + (group.lag or #redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 10000))
    pending = pending + group.pending
  end
end
return {waiting, pending}
