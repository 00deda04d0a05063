package sds

import (
	"slices"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

func TestDeltaEveryNameAsked(t *testing.T) {
	names := []string{
		NameDefault, webID, adminID, NameRootCA, ownTD, otherTD, NameAll,
		"file-root:/roots.pem", "file-cert:/c.pem~/k.pem", "file-root:system",
	}
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(append(slices.Clone(names), "nobody", NameDefault)...))
		r := p.next()
		wantNames(t, deltaNames(t, r), names...)
		wantNames(t, r.GetRemovedResources(), "nobody")
		for _, resource := range r.GetResources() {
			if resource.GetVersion() == "" {
				t.Errorf("%s has no version", resource.GetName())
			}
		}
		if r.GetNonce() == "" || r.GetTypeUrl() != TypeURL || r.GetSystemVersionInfo() == "" {
			t.Errorf("the response lacks something: %q %q %q", r.GetNonce(), r.GetTypeUrl(), r.GetSystemVersionInfo())
		}
		p.say(deltaAck(r))
		p.quiet()
		if len(d.unknown) != 1 || d.acked != 1 {
			t.Errorf("unknown told: %q, acked: %d", d.unknown, d.acked)
		}
	})
}

func TestDeltaPushesWhatChangedAndNothingTwice(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault, NameRootCA))
		p.say(deltaAck(p.next()))
		d.source.Set(d.source.Value())
		p.quiet()
		d.source.Set(fixture().later)
		wantNames(t, deltaNames(t, p.next()), NameDefault)
		p.quiet()
	})
}

func TestDeltaTellsWhatIsGone(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(adminID, NameDefault))
		p.next()
		d.source.Set(secretsOf(t, 1, fixture().web))
		r := p.next()
		wantNames(t, r.GetRemovedResources(), adminID)
		wantNames(t, deltaNames(t, r))
		d.source.Set(secretsOf(t, 1, fixture().web))
		p.quiet()
		d.source.Set(fixture().first)
		wantNames(t, deltaNames(t, p.next()), adminID)
	})
}

func TestDeltaSubscribedAgainIsSentAgain(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault, "nobody"))
		first := p.next()
		p.say(subscribe(NameDefault, "nobody"))
		second := p.next()
		wantNames(t, deltaNames(t, second), NameDefault)
		wantNames(t, second.GetRemovedResources(), "nobody")
		if first.GetNonce() == second.GetNonce() {
			t.Error("two answers have one nonce")
		}
	})
}

func TestDeltaUnsubscribes(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault, NameRootCA))
		r := p.next()
		// With a nonce that is stale or never was: the change counts all the same.
		p.say(&discoveryv3.DeltaDiscoveryRequest{
			ResponseNonce: "77", ResourceNamesUnsubscribe: []string{NameDefault, "phantom"},
		})
		p.quiet()
		d.source.Set(fixture().later)
		p.quiet()
		p.say(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce(), ResourceNamesUnsubscribe: []string{NameRootCA}})
		p.quiet()
		d.source.Set(fixture().first)
		p.quiet()
		if got := d.one(); got.Names != 0 || got.Wildcard {
			t.Errorf("an emptied subscription is shown as %+v", got)
		}
		p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{NameDefault}})
		wantNames(t, deltaNames(t, p.next()), NameDefault)
	})
}

func TestDeltaWildcard(t *testing.T) {
	for name, first := range map[string]*discoveryv3.DeltaDiscoveryRequest{"legacy": subscribe(), "explicit": subscribe("*")} {
		t.Run(name, func(t *testing.T) {
			withDoor(t, nil, func(t *testing.T, d *door) {
				p := d.delta()
				p.say(first)
				wantNames(t, deltaNames(t, p.next()), webID, adminID, ownTD, otherTD)
				p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{NameDefault, webID}})
				wantNames(t, deltaNames(t, p.next()), NameDefault, webID)
				if got := d.one(); got.Names != 2 || !got.Wildcard {
					t.Errorf("shown %+v", got)
				}
				d.source.Set(fixture().later)
				wantNames(t, deltaNames(t, p.next()), NameDefault, webID)

				// The peer cannot know whether the wildcard still brings them: the answer tells.
				p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{NameDefault, webID}})
				r := p.next()
				wantNames(t, deltaNames(t, r), webID)
				wantNames(t, r.GetRemovedResources(), NameDefault)

				d.source.Set(secretsOf(t, 1, fixture().web2))
				r = p.next()
				wantNames(t, deltaNames(t, r))
				wantNames(t, r.GetRemovedResources(), adminID, otherTD)

				p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"}})
				wantNames(t, deltaNames(t, p.next()), webID, ownTD)

				p.say(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"*"}})
				p.quiet()
				d.source.Set(fixture().first)
				p.quiet()
				p.say(&discoveryv3.DeltaDiscoveryRequest{})
				p.quiet() // no names are no wildcard any more
			})
		})
	}
}

func TestDeltaResumes(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault, NameRootCA, adminID))
		have := map[string]string{}
		for _, r := range p.next().GetResources() {
			have[r.GetName()] = r.GetVersion()
		}
		d.source.Set(secretsOf(t, 1, fixture().web2)) // default is new, adminID is gone, ROOTCA as it was

		again := d.delta()
		r := subscribe(NameDefault, NameRootCA, adminID)
		r.InitialResourceVersions = have
		again.say(r)
		got := again.next()
		wantNames(t, deltaNames(t, got), NameDefault)
		wantNames(t, got.GetRemovedResources(), adminID)
		again.quiet()

		wild := d.delta()
		r = subscribe()
		r.InitialResourceVersions = map[string]string{ownTD: "old", adminID: have[adminID], "alias": "x"}
		wild.say(r)
		got = wild.next()
		wantNames(t, deltaNames(t, got), ownTD, webID)
		wantNames(t, got.GetRemovedResources(), adminID, "alias")

		// What a peer has of names that it does not ask for is not our business; nor are such versions later on.
		other := d.delta()
		r = subscribe(NameRootCA)
		r.InitialResourceVersions = map[string]string{adminID: have[adminID], NameRootCA: have[NameRootCA]}
		other.say(r)
		other.quiet()
		r = subscribe(NameRootCA)
		r.InitialResourceVersions = map[string]string{NameRootCA: have[NameRootCA]}
		other.say(r)
		wantNames(t, deltaNames(t, other.next()), NameRootCA)
	})
}

func TestDeltaNackDoesNotLoop(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		p.say(subscribe(NameDefault, NameRootCA))
		p.say(deltaAck(p.next()))
		d.source.Set(fixture().later)
		bad := p.next()
		d.source.Set(fixture().first)
		good := p.next()
		r := deltaAck(bad)
		r.ErrorDetail = &rpcstatus.Status{Message: "line\nbreak -----BEGIN PRIVATE KEY----- abc"}
		p.say(r) // a newer answer is out already, and the refusal of the older still counts
		p.say(deltaAck(good))
		p.quiet()
		if len(d.nacks) != 1 || !slices.Equal(d.nacks[0].Names, []string{NameDefault}) || d.nacks[0].Detail != "line break (the rest quotes the secret and is withheld)" {
			t.Errorf("told %+v", d.nacks)
		}
		d.source.Set(fixture().later)
		bad = p.next()
		r = deltaAck(bad)
		r.ErrorDetail = &rpcstatus.Status{Message: "again"}
		p.say(r)
		p.quiet()
		if len(d.nacks) != 2 || !slices.Equal(d.nacks[1].Names, []string{NameDefault}) {
			t.Errorf("told %+v", d.nacks)
		}
	})
}

func TestDeltaEmptyTypeURL(t *testing.T) {
	withDoor(t, nil, func(t *testing.T, d *door) {
		p := d.delta()
		r := subscribe(NameDefault)
		r.TypeUrl = ""
		p.say(r)
		if got := p.next().GetTypeUrl(); got != TypeURL {
			t.Errorf("the response's type is %q", got)
		}
	})
}
