-- Drop a turn whose deadline has passed while a stage that waits for it has not begun: no worker may ever claim it.
-- KEYS   1-6 the turn's
-- ARGV   turn id, then for each stage: name, log it writes, failure for a deadline
-- answer 1: it ended | 0
local h = fields(KEYS[1], 'state', 'deadline', 'ttl')
local deadline, now = tonumber(h[2] or 0), clock()
if h[1] ~= 'running' or deadline == 0 or now <= deadline then return 0 end
for i = 2, #ARGV, 3 do
  local stage, log, too_late = unpack(ARGV, i, i + 2)
  local s = fields(KEYS[1], stage .. ':queued', stage .. ':done', log .. ':next', stage .. ':lease', stage .. ':consumer')
  local waits = s[1] and not s[2] and tonumber(s[3] or 0) == 0
  if waits and not (s[5] and tonumber(s[4] or 0) > now) then
    finish(ARGV[1], 'error', too_late, h[3])
    return 1
  end
end
return 0
