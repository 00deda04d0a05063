package agent

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// Tokens of the largest size that is allowed: the CA takes 4 MiB a message and not a byte more.
func TestCallsFitTheCAsLimits(t *testing.T) {
	const many = 400
	n := newNode(t)
	for i := range many {
		name := fmt.Sprintf("w%d", i)
		n.workload(name)
		token := name + strings.Repeat("x", maxTokenBytes-len(name))
		n.ca.Workload(token, "/ns/test/sa/"+name)
		must(t, os.WriteFile(n.path(name+".token"), []byte(token), 0o600))
	}
	a := n.start()
	eventually(t, "all fresh", func() bool {
		for _, w := range a.roster.list() {
			if w.condition() != conditionFresh {
				return false
			}
		}
		return true
	})
	for _, size := range n.ca.Seen().Batches {
		if size*maxTokenBytes > client.MaxBatchBytes {
			t.Errorf("a call of %d requests is %d bytes", size, size*maxTokenBytes)
		}
	}
}

// Who gives up does not take the others' call along, and a batcher that stops leaves nobody waiting for ever.
func TestWhoGivesUpLeavesTheBatchAlone(t *testing.T) {
	n := newNode(t)
	n.ca.Stop()
	hold := make(chan struct{})
	c, err := client.New(client.Config{Address: n.config.Server, TrustDomain: n.config.TrustDomain, Bundle: newTestTrust(t, n.ca)})
	must(t, err)
	defer c.Close()
	calls := make(chan int, 10)
	b := newBatcher("test", c, func(size int, _ time.Duration, _ *meshcav1.IssueX509SVIDsResponse, _ error) {
		calls <- size
		<-hold
	})
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() { b.run(ctx); close(stopped) }()

	impatient, giveUp := context.WithTimeout(ctx, 50*time.Millisecond)
	defer giveUp()
	answers := make(chan error, 2)
	for _, ctx := range []context.Context{impatient, ctx} {
		go func() {
			_, err := b.issue(ctx, &meshcav1.X509SVIDRequest{Csr: []byte("csr"), Token: "token"})
			answers <- err
		}()
	}
	if err := <-answers; refusal.Of(err) != refusal.CAUnreachable {
		t.Errorf("who gave up: %v", err)
	}
	close(hold)
	if err := <-answers; refusal.Of(err) != refusal.CAUnreachable && refusal.Of(err) != refusal.CAUntrusted {
		t.Errorf("who waited: %v", err)
	}
	if size := <-calls; size < 1 || size > 2 {
		t.Errorf("a call of %d", size)
	}
	cancel()
	<-stopped
	if _, err := b.issue(ctx, &meshcav1.X509SVIDRequest{}); err == nil {
		t.Error("a batcher that stopped answers")
	}
}
