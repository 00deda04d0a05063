package admin

import (
	"fmt"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// signerFindings judge what the CA does in a cluster beside attesting: requests that are answered, trust that is published.
func signerFindings(c *meshcav1.ClusterStatus, sequence uint64) []*meshcav1.Finding {
	var found []*meshcav1.Finding
	for _, s := range c.GetSigners() {
		f := &meshcav1.Finding{Subject: "signer of cluster " + c.GetName(), Level: levelOK, Detail: fmt.Sprintf("%s are answered, %d are open", s.GetApi(), s.GetPending())}
		if s.GetState() != "serving" {
			f.Level, f.Detail = levelWarning, fmt.Sprintf("%s are not answered (%s): %s", s.GetApi(), s.GetState(), s.GetWhy())
			f.Hint = "docs/kubernetes-signers.md says what the cluster has to serve and to allow; it is looked at again by itself."
		}
		found = append(found, f)
	}
	for _, p := range c.GetPublished() {
		f := &meshcav1.Finding{Subject: "trust published", Level: levelOK, Detail: fmt.Sprintf("%s has bundle %d", p.GetName(), p.GetSequence())}
		switch {
		case p.GetNotServed():
			f.Level, f.Detail = levelWarning, p.GetName()+": "+p.GetFault()
			f.Hint = "Take it out of the configuration, or switch the API on in the cluster. Rollouts do not wait for it."
		case p.GetApart():
			f.Level, f.Detail = levelWarning, p.GetName()+": "+p.GetFault()
			f.Hint = "It is for who administers that namespace: its proxies read the trust bundle there. Nothing else waits for it, no rollout either."
		case p.GetFault() != "":
			f.Level, f.Detail = levelWarning, p.GetName()+": "+p.GetFault()
			f.Hint = "It is tried again by itself. A rollout waits for it; `certctl ca continue --despite` goes on without it."
		case p.GetSequence() < sequence:
			f.Level, f.Detail = levelWarning, fmt.Sprintf("%s has bundle %d, and the CA %d", p.GetName(), p.GetSequence(), sequence)
			f.Hint = "It is written within moments; if not, the CA's log says why."
		}
		found = append(found, f)
	}
	return found
}
