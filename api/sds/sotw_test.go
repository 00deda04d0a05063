package sds

import (
	"slices"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

func TestSotWEveryNameAsked(t *testing.T) {
	names := []string{
		NameDefault, webID, adminID, NameRootCA, ownTD, otherTD, NameAll,
		"file-root:/roots.pem", "file-cert:/c.pem~/k.pem", "file-root:system",
	}
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(slices.Concat(names, []string{NameDefault, ""})...))
		r := p.next()
		wantNames(t, namesIn(t, r), names...)
		if r.GetTypeUrl() != TypeURL || r.GetNonce() == "" || r.GetVersionInfo() == "" {
			t.Errorf("the response lacks something: %q %q %q", r.GetTypeUrl(), r.GetNonce(), r.GetVersionInfo())
		}
		p.say(ack(r, names...))
		p.quiet()
		if d.acked != 1 || d.one().Names != len(names) {
			t.Errorf("acked %d, shown %+v", d.acked, d.one())
		}
	})
}

func TestSotWUnknownIsLeftOut(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault, "spiffe://td.test/nobody", "default "))
		wantNames(t, namesIn(t, p.next()), NameDefault)
		if len(d.unknown) != 1 {
			t.Fatalf("unknown names were told %d times, want once", len(d.unknown))
		}
		wantNames(t, d.unknown[0], "spiffe://td.test/nobody", "default ")
		wantNames(t, d.one().Unknown, "spiffe://td.test/nobody", "default ")
	})
}

func TestSotWOnlyUnknownIsSilence(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask("nobody"))
		p.quiet() // an empty response would make Envoy say that its secret is missing, and NACK
		if len(d.unknown) != 1 {
			t.Errorf("unknown names were told %d times, want once", len(d.unknown))
		}
	})
}

func TestSotWUnknownBecomesKnown(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		f := fixture()
		d.source.Set(secretsOf(t, 1, f.web))
		p := d.sotw()
		p.say(ask(adminID))
		p.quiet()
		d.source.Set(f.first)
		wantNames(t, namesIn(t, p.next()), adminID)
		if got := d.one().Unknown; len(got) != 0 {
			t.Errorf("still shown as unknown: %q", got)
		}
	})
}

func TestSotWPushesWhatChangedAndNothingTwice(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault, adminID, NameRootCA))
		first := p.next()
		p.say(ack(first, NameDefault, adminID, NameRootCA))
		d.source.Set(d.source.Value())
		p.quiet()
		d.source.Set(fixture().later)
		second := p.next()
		wantNames(t, namesIn(t, second), NameDefault)
		if second.GetVersionInfo() == first.GetVersionInfo() || second.GetNonce() == first.GetNonce() {
			t.Error("new content came with an old version or nonce")
		}
		// A rotation that comes while the answer to the one before is still open.
		d.source.Set(fixture().first)
		third := p.next()
		p.say(ack(second, NameDefault, adminID, NameRootCA)) // stale by now
		p.say(ack(third, NameDefault, adminID, NameRootCA))
		p.quiet()
	})
}

func TestSotWVersionIsOfContent(t *testing.T) {
	var versions []string
	for range 2 {
		withDoor(t, nil, func(t *testing.T, d *door) {
			again := secretsOf(t, 5, fixture().web)
			d.source.Set(again)
			p := d.sotw()
			p.say(ask(NameDefault))
			versions = append(versions, p.next().GetVersionInfo())
		})
	}
	if versions[0] != versions[1] {
		t.Errorf("two servers give the same content the versions %q", versions)
	}
}

func TestSotWResumesWithoutSending(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		version := p.next().GetVersionInfo()

		again := d.sotw()
		r := ask(NameDefault)
		r.VersionInfo = version
		again.say(r)
		again.quiet()
		d.source.Set(fixture().later)
		wantNames(t, namesIn(t, again.next()), NameDefault)

		// The version is of another name, or of one of several: nobody knows what the peer holds.
		for _, names := range [][]string{{webID}, {NameDefault, NameRootCA}, {}} {
			other := d.sotw()
			r := ask(names...)
			r.VersionInfo = version
			other.say(r)
			if len(other.next().GetResources()) == 0 {
				t.Errorf("%q: nothing came", names)
			}
		}
	})
}

func TestSotWChangesSubscription(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		r := p.next()
		p.say(ack(r, NameDefault, NameRootCA))
		r = p.next()
		wantNames(t, namesIn(t, r), NameRootCA)
		p.say(ack(r, NameRootCA)) // default is given up
		p.quiet()
		d.source.Set(fixture().later)
		p.quiet()
		p.say(ack(r, NameDefault, NameRootCA)) // and asked for again
		r = p.next()
		wantNames(t, namesIn(t, r), NameDefault)
		p.say(ack(r)) // nothing any more: no wildcard after names
		p.quiet()
		d.source.Set(fixture().first)
		p.quiet()
		if got := d.one(); got.Names != 0 || got.Wildcard {
			t.Errorf("shown %+v", got)
		}
	})
}

func TestSotWWildcard(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		all := []string{webID, adminID, ownTD, otherTD}
		p := d.sotw()
		p.say(ask())
		r := p.next()
		wantNames(t, namesIn(t, r), all...)
		p.say(ack(r))
		p.quiet()
		p.say(ack(r, "*", NameDefault))
		r = p.next()
		wantNames(t, namesIn(t, r), NameDefault)
		d.source.Set(fixture().later)
		r = p.next()
		wantNames(t, namesIn(t, r), NameDefault, webID)
		p.say(ack(r, NameDefault))
		p.quiet()
		d.source.Set(fixture().first)
		r = p.next()
		wantNames(t, namesIn(t, r), NameDefault)
		p.say(ack(r, NameDefault, adminID)) // sent before, but not by name
		wantNames(t, namesIn(t, p.next()), adminID)
	})
}

func TestSotWStaleNonceIsIgnored(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		first := p.next()
		d.source.Set(fixture().later)
		second := p.next()
		p.say(ack(first, NameDefault, NameRootCA))
		p.quiet()
		for _, nonce := range []string{"17", "x", "-1", "0", "01", "99999999999999999999999"} {
			r := ack(second, NameDefault, NameRootCA)
			r.ResponseNonce = nonce
			p.say(r)
			p.quiet()
		}
		p.say(ack(second, NameDefault, NameRootCA))
		wantNames(t, namesIn(t, p.next()), NameRootCA)
		if d.acked != 2 {
			t.Errorf("%d answers count as acknowledged, want the two that were", d.acked)
		}
	})
}

func TestSotWNackDoesNotLoop(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		first := p.next()
		p.say(ack(first, NameDefault))
		d.source.Set(fixture().later)
		second := p.next()
		for range 3 {
			p.say(nack(second, first.GetVersionInfo(), NameDefault))
			p.quiet()
		}
		if len(d.nacks) != 3 || !slices.Equal(d.nacks[0].Names, []string{NameDefault}) || d.nacks[0].Detail != "unusable" {
			t.Errorf("NACKs told: %+v", d.nacks)
		}
		if got := d.one(); got.Nacks != 3 || got.LastNack != "unusable" {
			t.Errorf("shown %+v", got)
		}
		d.source.Set(d.source.Value())
		p.quiet()
		d.source.Set(fixture().first)
		third := p.next()
		p.say(ack(third, NameDefault))
		if got := d.one(); got.Nacks != 3 || got.LastNack != "" {
			t.Errorf("after a good answer: shown %+v", got)
		}
	})
}

func TestSotWNackMayChangeTheSubscription(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		p.say(nack(p.next(), "", NameDefault, NameRootCA))
		wantNames(t, namesIn(t, p.next()), NameRootCA)
	})
}

func TestSotWWaitsForTheFirstSecrets(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		d.source.Set(nil)
		p := d.sotw()
		p.say(ask(NameDefault, "nobody", "file-root:/r"))
		r := p.next()
		wantNames(t, namesIn(t, r), "file-root:/r") // needs nothing of ours
		p.quiet()
		if len(d.unknown) != 0 {
			t.Errorf("told as unknown though nothing is known yet: %q", d.unknown)
		}
		d.source.Set(fixture().first)
		wantNames(t, namesIn(t, p.next()), NameDefault)
	})
}

func TestSotWTypeURL(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		r := ask(NameDefault)
		r.TypeUrl = ""
		p.say(r)
		if got := p.next().GetTypeUrl(); got != TypeURL {
			t.Errorf("the response's type is %q", got)
		}
	})
}

func TestSotWClosedSideIsAnswered(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.sotw()
		p.say(ask(NameDefault))
		if err := p.half(); err != nil {
			t.Fatal(err)
		}
		wantNames(t, namesIn(t, p.next()), NameDefault)
		if err := p.ended(); err.Error() != "EOF" {
			t.Errorf("the stream ended with %v", err)
		}
		synctest.Wait()
		if len(d.closed) != 1 || d.closed[0] != nil {
			t.Errorf("closed with %v", d.closed)
		}
	})
}

func TestSotWManyPeersAreServedAlike(t *testing.T) {
	withDoor(t, func(c *Config) { c.Limits.StreamsPerPeer = 50 }, func(t *testing.T, d *door) {
		var peers []*caller[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
		for range 50 {
			p := d.sotw()
			p.say(ask(NameDefault))
			peers = append(peers, p)
		}
		for _, s := range []*Secrets{nil, fixture().later, fixture().first} {
			if s != nil {
				d.source.Set(s)
			}
			for _, p := range peers {
				wantNames(t, namesIn(t, p.next()), NameDefault)
			}
		}
	})
}
