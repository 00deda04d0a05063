package rotation

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// Schedule says when the successor of a credential with this term is due. Schedules are pure: the same term gives the
// same moment, whatever the clock shows.
type Schedule func(t Term) time.Time

var _ Schedule = HalfLife

// HalfLife is due half way through the life: for the few credentials (a CA's own) that need not be spread.
func HalfLife(t Term) time.Time { return t.Issued().Add(t.Life / 2) }

// Phased spreads a fleet: the key's hash modulo T/2 is its phase, and it is due at the first moment of that phase, in
// wall time, that lies at least T/4 after issue. So it is due every T/2 for ever and never later than 3T/4, and holders
// that started in the same second are spread evenly over T/2 from their first cycle on.
//
// The key must tell apart what should be spread: for an SVID the agent, the SPIFFE ID and where it is served.
func Phased(key string) Schedule {
	sum := sha256.Sum256([]byte(key))
	hash := binary.BigEndian.Uint64(sum[:8])
	return func(t Term) time.Time {
		issued := t.Issued()
		earliest := issued.Add(t.Life / 4)
		period := grain(t.Life) / 2
		if period <= 0 {
			return earliest
		}
		phase := int64(hash % uint64(period))
		// Into the period, in wall time since 1970; Add keeps the monotonic reading that t.Received carries.
		into := (earliest.UnixNano() - phase) % int64(period)
		if into < 0 {
			into += int64(period)
		}
		if into == 0 {
			return earliest
		}
		return earliest.Add(period - time.Duration(into))
	}
}

// grain cuts what makes two issuances of the same life differ (fractions of a second between a clock and the whole
// seconds of NotAfter), so that they share one grid of phases. It cuts down, never up: that keeps 3T/4 a bound.
func grain(life time.Duration) time.Duration {
	switch {
	case life >= time.Hour:
		return life.Truncate(time.Minute)
	case life >= time.Second:
		return life.Truncate(time.Second)
	default:
		return life
	}
}
