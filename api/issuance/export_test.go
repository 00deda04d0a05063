package issuance

import "time"

// SetTimes replaces what the package waits for; before Serve.
func (s *Server) SetTimes(answer, hello, recheck time.Duration) {
	s.times = times{answer: answer, hello: hello, recheck: recheck, settle: 10 * time.Millisecond}
}
