package kill

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
)

// Kill -9 at every step of a first start, in which the root that signs is settled and the bundle is made: the next one makes
// a whole of it, with the same root, and the agent that was there all the while follows it.
func TestKilledFirstStarts(t *testing.T) {
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	for _, point := range startSteps {
		running.Go(func() {
			if err := firstStart(t, b, point); err != nil {
				t.Errorf("killed at %s: %v", point, err)
			}
		})
	}
	running.Wait()
}

// startSteps are the failpoints on the way of a first start, until the agent and its workloads have their SVIDs.
var startSteps = []string{
	"firstRootChosen", "firstRootEntered", "bundleMade", "bundleStored", "bundlePublished", "bundleFileMade", "bundleFileWritten",
	"intermediateAsked", "intermediateSigned", "intermediateInUse", "keyRecordMade", "keyRecordWritten", "leafPrepared", "leafRecorded",
	"leafSigned", "agentAdmitting", "agentAdmitted", "stateMade", "stateSent", "bundleAcknowledged", "beforeSyncDataPages",
	"beforeWriteMetaError", "beforeSyncMetaPage",
}

// firstStart kills a CA that starts for the first time at a failpoint, and starts it again.
func firstStart(t *testing.T, b built, point string) error {
	dir, err := os.MkdirTemp("", "kill") // t.TempDir is too long for sockets
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(t.Context(), endsIn)
	defer cancel()
	v := variant{settings: kept(short), ends: first}
	s, err := newSite(b, dir, v.settings, map[string]string{point: fault{point, 1}.term()})
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.startAgent(context.WithoutCancel(ctx), b.tokens); err != nil {
		return err
	}
	d := &drive{variant: v, site: s, witness: newWitness(dir, s.root, v.settings)}
	s.startPeers(context.WithoutCancel(ctx), d.witness, nil)
	err = s.ca.Await(ctx, func(ctx context.Context) error {
		n, err := s.passed(ctx, point)
		if err == nil && n == 0 {
			err = errors.New("it has not come there")
		}
		return err
	})
	if err != nil {
		return err
	}
	d.kill()
	if err := d.start(nil); err != nil {
		return err
	}
	if err := d.ready(ctx); err != nil {
		return err
	}
	a, err := s.authorities(ctx)
	if err == nil {
		err = d.over(a)
	}
	if err != nil {
		return fmt.Errorf("after another start: %w", err)
	}
	return d.conclude(ctx)
}
