-- Take jobs whose worker has been silent for too long.
-- KEYS   job streams of one stage
-- ARGV   consumer, how many, silence (ms)
-- answer per stream {0-0, {{entry id, fields}, ...}}
local consumer, wanted, idle = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local answer = {}
for i, stream in ipairs(KEYS) do
  local entries, from = {}, '0-0'
  while wanted > 0 do
    local got = grouped(stream, 'XAUTOCLAIM', stream, GROUP, consumer, idle, from, 'COUNT', wanted)
    for _, entry in ipairs(got[2]) do entries[#entries + 1] = entry end
    wanted = wanted - #got[2]
    from = got[1]
    if from == '0-0' then break end
  end
  answer[i] = {'0-0', entries}
end
return answer
