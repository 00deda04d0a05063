package vault

import (
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/ca"
)

// Status is how we stand with Vault, for people. It holds no credential.
type Status struct {
	Address, Namespace, Mount string
	// IssuerID is what the configuration's issuer was found to be; empty before it was.
	IssuerID string
	// LoginBy is tokenFile, appRole, kubernetes or cert.
	LoginBy string
	// LoggedIn says that a login stands, since LoggedInAt; LeaseEnds is zero where it has no end.
	LoggedIn              bool
	LoggedInAt, LeaseEnds time.Time
	// Sealed says that Vault's last answer was that.
	Sealed bool
	// LastContact is when Vault last did what was asked. LastError is how a call failed that none has succeeded after.
	LastContact time.Time
	LastError   error
	LastErrorAt time.Time
	// Issuers are those that were seen at SeenAt; LeftOut more were not read.
	Issuers []ca.UpstreamIssuer
	SeenAt  time.Time
	LeftOut int
	// Notice is what somebody should look at though all goes well; empty when there is nothing.
	Notice string
	// ClockAhead is how far Vault's clock is ahead of ours, negative when it is behind. What the network's delay could
	// explain counts as nothing.
	ClockAhead time.Duration
}

// state is what Status is made of.
type state struct {
	mu      sync.Mutex
	sealed  bool
	contact time.Time
	failed  map[Operation]failure // by what it was for: one that works does not hide another that does not
	issuers []ca.UpstreamIssuer
	seenAt  time.Time
	leftOut int
	notice  string
}

type failure struct {
	err error
	at  time.Time
}

func newState() *state { return &state{failed: map[Operation]failure{}} }

// called takes in how a call ended.
func (s *state) called(op Operation, err error) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if kind := KindOf(err); kind != KindCanceled {
			s.failed[op] = failure{err, now}
			s.sealed = kind == KindSealed
		}
		return
	}
	s.contact, s.sealed = now, false
	delete(s.failed, op)
	if op == OpLogin {
		delete(s.failed, OpRenew)
	}
}

// saw takes in what issuers there are.
func (s *state) saw(issuers []ca.UpstreamIssuer, leftOut int, notice string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.issuers, s.leftOut, s.notice, s.seenAt = slices.Clone(issuers), leftOut, notice, time.Now()
}

// issuer returns an issuer as it was last seen.
func (s *state) issuer(ref string) (ca.UpstreamIssuer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.issuers, func(x ca.UpstreamIssuer) bool { return x.Ref == ref })
	if i < 0 {
		return ca.UpstreamIssuer{}, false
	}
	return s.issuers[i], true
}

func (s *state) show(st *Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Sealed, st.LastContact = s.sealed, s.contact
	st.Issuers, st.SeenAt, st.LeftOut, st.Notice = slices.Clone(s.issuers), s.seenAt, s.leftOut, s.notice
	for _, f := range s.failed {
		if f.at.After(st.LastErrorAt) {
			st.LastError, st.LastErrorAt = f.err, f.at
		}
	}
}
