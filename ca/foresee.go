package ca

import (
	"fmt"
	"time"
)

// Foresee tells when an intermediate of this issuer would end, at most, if it were signed now, and why the line would have
// none of it; nil where nothing is seen that hinders. It asks nobody and changes nothing.
func (l *Line) Foresee(i UpstreamIssuer) (notAfter time.Time, err error) {
	if last := l.last.Value(); last != nil && last.barred {
		return time.Time{}, last.err
	}
	switch {
	case i.Fault != nil:
		return time.Time{}, fmt.Errorf("the upstream's issuer %s (%s) cannot be used: %w", i.Name, i.Ref, i.Fault)
	case i.Root == nil || RootID(i.Root) != l.root:
		return time.Time{}, fmt.Errorf("the upstream's issuer %s (%s) leads to another root", i.Name, i.Ref)
	}
	if err := l.authority.Barred(i.Path); err != nil {
		return time.Time{}, err
	}
	now := time.Now()
	notAfter = now.Add(l.authority.c.Life)
	if i.NotAfter.Before(notAfter) {
		notAfter = i.NotAfter
	}
	if left := notAfter.Sub(now); l.authority.tooSoon(left) {
		return time.Time{}, fmt.Errorf("it would end in %s, too soon to issue under it: look at the ends of the upstream's own certificates", left.Round(time.Second))
	}
	return notAfter, nil
}

// tooSoon reports whether an intermediate with so much left of its chain is not put into use: hardly anything could be
// issued under it.
func (a *Authority) tooSoon(left time.Duration) bool { return left <= 2*margin(a.c.LeafTTL) }
