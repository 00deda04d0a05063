package issuance

import (
	"net"
	"time"

	"github.com/meshca/meshca/ca/registration"
)

const (
	// Sip is sip.
	Sip = sip
	// connectionBytes is what a stranger's connection takes at most, as measured with handshakes that are half done: some 105 KB.
	connectionBytes = 128 << 10
	// frameBytes and crumb are what each DATA frame takes beside its content, and how many bytes there are for each: see
	// inbound.Watch.
	frameBytes, crumb = 70, 512
)

// ErrGulp is errGulp.
var ErrGulp = errGulp

// Shake shakes hands.
func (s *Server) Shake(raw net.Conn) error {
	_, _, err := s.admitting.ServerHandshake(raw)
	return err
}

// Open opens a stranger's call, and ends it.
func (s *Server) Open(address string) error {
	release, err := s.accounts.open(newParty(registration.Caller{Address: address}, false), false)
	if err == nil {
		release()
	}
	return err
}

// Sipping is a stranger's connection; tls makes what is above its raw one.
func Sipping(raw net.Conn, tls func(net.Conn) net.Conn) net.Conn {
	sips := &sipping{Conn: raw, left: sip}
	return &strangersConn{tls(sips), sips, func() {}}
}

// SetPatience replaces how long a call's message may take to arrive; before Serve.
func (s *Server) SetPatience(d time.Duration) { s.accounts.patience = d }

// Arriving are the agents' calls whose message has not arrived.
func (s *Server) Arriving() int64 { return s.accounts.arriving.Load() }

// SetTimes replaces what the package waits for; before Serve.
func (s *Server) SetTimes(answer, hello, recheck time.Duration) {
	s.times = times{answer: answer, hello: hello, recheck: recheck, settle: 10 * time.Millisecond, wall: time.Now}
}

// SetWall replaces the wall clock that steps are looked for in; before Serve and behind SetTimes.
func (s *Server) SetWall(wall func() time.Time) { s.times.wall = wall }

// HalfSent is what messages that are half sent and the connections of strangers can hold by default, in bytes.
func HalfSent() (strangers, agents int) {
	l := Limits{}.withDefaults()
	return l.OpenCallsWithoutSVID/halfShare*maxMessage*(crumb+frameBytes)/crumb + l.ConnectionsWithoutSVID*connectionBytes, l.OpenMessages * maxMessage
}
