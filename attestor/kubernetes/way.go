package kubernetes

import (
	"net/http"
	"time"

	"k8s.io/client-go/rest"
)

// REST is the way to the API server as the kubeconfig says now, for others that speak to it as the CA's account: its
// configuration, which must not be changed, and the HTTP client of it, with the connections that attestation uses too.
// Both are others once the kubeconfig has changed, so they are to be asked for with each call. They are nil where the API
// server is never called (liveness none, and keys from elsewhere).
func (c *Cluster) REST() (*rest.Config, *http.Client) {
	if c.api == nil {
		return nil, nil
	}
	now := c.api.clients()
	return now.conf, now.shared
}

// Doubt is told that a call by REST failed: credentials that were replaced in the kubeconfig are a usual reason.
func (c *Cluster) Doubt() {
	if c.api != nil {
		c.api.doubt()
	}
}

// ClockSkew is the API server's clock minus ours, as its last answer showed; zero before the first.
func (c *Cluster) ClockSkew() time.Duration {
	if c.api == nil {
		return 0
	}
	ahead, _ := c.api.skew.get()
	return ahead
}
