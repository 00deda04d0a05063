package issuance

import "fmt"

// Limits bound what one peer may cost. An agent that the CA knows is a peer by its SVID; everybody else, whatever SVID he
// shows, is one by his address, and all of those together are bounded too. The zero value of a field takes its default.
type Limits struct {
	// CallsPerSecond of one peer, with bursts of four times as many. Default 50.
	CallsPerSecond float64 `json:"callsPerSecond"`
	// CallsPerSecondWithoutSVID of one address, with bursts of four times as many: an agent needs one such call when it
	// starts, and a workload that calls by itself (policy: direct) one for each renewal. Each leaves an audit line. An IPv6 /64
	// has 64 times as many. Default 5; raise it where many agents come from behind one address.
	CallsPerSecondWithoutSVID float64 `json:"callsPerSecondWithoutSVID"`
	// BytesPerSecond of messages of one peer, with bursts of eight times as many. Default 4 MiB.
	BytesPerSecond int `json:"bytesPerSecond"`
	// RequestsPerSecond is the number of CSRs of one peer, with bursts of eight times as many. Each may leave an audit
	// line. Default 250.
	RequestsPerSecond int `json:"requestsPerSecond"`
	// OpenCalls of one peer, streams among them. Default 32.
	OpenCalls int `json:"openCalls"`
	// OpenCallsWithoutSVID of all callers together that are no agents; one address may have a sixteenth of them. Of half of
	// them the message may be on its way, 4 MiB and ten seconds long; when more come, the oldest such call of the address
	// that has the most is ended, with its connection. Default 64.
	OpenCallsWithoutSVID int `json:"openCallsWithoutSVID"`
	// ConnectionsWithoutSVID that are open at a time, of all callers together that are no agents, and of agents that still
	// shake hands. When all are taken, who comes gets the place of the oldest connection of the address that has the most.
	// Default 1024.
	ConnectionsWithoutSVID int `json:"connectionsWithoutSVID"`
	// OpenMessages is the number of calls of all agents together whose message is still arriving; it may be 4 MiB long, and has
	// ten seconds. Default 96.
	OpenMessages int `json:"openMessages"`
	// OpenRequests is the number of CSRs of one peer that the CA works on at a time. Default 1024.
	OpenRequests int `json:"openRequests"`
	// RequestsInFlight is the number of CSRs that the CA works on at a time, of all peers. Default 4096.
	RequestsInFlight int `json:"requestsInFlight"`
	// Connections that are open at a time, of all peers. Default 16384.
	Connections int `json:"connections"`
	// ConnectionsPerAddress that are open at a time. An agent has one, for a moment two. Default 256; raise it where many
	// agents come from behind one address.
	ConnectionsPerAddress int `json:"connectionsPerAddress"`
}

// maxLimit bounds each of them: no machine serves more, and nothing overflows below it.
const maxLimit = 1 << 30

// Check refuses limits that cannot be meant.
func (l Limits) Check() error {
	for _, f := range []struct {
		key   string
		value float64
	}{
		{"callsPerSecond", l.CallsPerSecond}, {"callsPerSecondWithoutSVID", l.CallsPerSecondWithoutSVID},
		{"bytesPerSecond", float64(l.BytesPerSecond)}, {"requestsPerSecond", float64(l.RequestsPerSecond)},
		{"openCalls", float64(l.OpenCalls)}, {"openCallsWithoutSVID", float64(l.OpenCallsWithoutSVID)},
		{"openMessages", float64(l.OpenMessages)}, {"openRequests", float64(l.OpenRequests)}, {"requestsInFlight", float64(l.RequestsInFlight)},
		{"connectionsWithoutSVID", float64(l.ConnectionsWithoutSVID)},
		{"connections", float64(l.Connections)}, {"connectionsPerAddress", float64(l.ConnectionsPerAddress)},
	} {
		if !(f.value >= 0 && f.value <= maxLimit) { // NaN lies nowhere
			return fmt.Errorf("%s: %g does not lie between 0 (the default) and %d", f.key, f.value, maxLimit)
		}
	}
	return nil
}

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	if l.CallsPerSecond <= 0 {
		l.CallsPerSecond = 50
	}
	if l.CallsPerSecondWithoutSVID <= 0 {
		l.CallsPerSecondWithoutSVID = 5
	}
	set(&l.BytesPerSecond, 4<<20)
	set(&l.RequestsPerSecond, 250)
	set(&l.OpenCalls, 32)
	set(&l.OpenCallsWithoutSVID, 64)
	set(&l.ConnectionsWithoutSVID, 1024)
	set(&l.OpenMessages, 96)
	set(&l.OpenRequests, 1024)
	set(&l.RequestsInFlight, 4096)
	set(&l.Connections, 16384)
	set(&l.ConnectionsPerAddress, 256)
	return l
}
