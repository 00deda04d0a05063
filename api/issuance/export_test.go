package issuance

import "time"

// SetPatience replaces how long a call's message may take to arrive; before Serve.
func (s *Server) SetPatience(d time.Duration) { s.accounts.patience = d }

// Arriving are the agents' calls whose message has not arrived.
func (s *Server) Arriving() int64 { return s.accounts.arriving.Load() }

// SetTimes replaces what the package waits for; before Serve.
func (s *Server) SetTimes(answer, hello, recheck time.Duration) {
	s.times = times{answer: answer, hello: hello, recheck: recheck, settle: 10 * time.Millisecond}
}

// HalfSent is what messages that are half sent can hold by default, in bytes.
func HalfSent() (strangers, agents int) {
	l := Limits{}.withDefaults()
	return l.OpenCallsWithoutSVID * maxMessage, l.OpenMessages * maxMessage
}
