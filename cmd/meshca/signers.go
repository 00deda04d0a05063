package main

import (
	"fmt"
	"os"

	"github.com/meshca/meshca/api/kubesigner"
)

// openPublishers makes those who bring the trust bundle to where clusters' readers look for it.
func (d *daemon) openPublishers() error {
	d.publishers = map[string]*kubesigner.Publisher{}
	for _, k := range d.config.Clusters {
		if !k.Publish.Enabled() {
			continue
		}
		p, err := kubesigner.NewPublisher(kubesigner.PublisherOptions{
			Cluster: k.Name, Config: k.Publish, Signer: k.Signers.Name, Connection: d.clusters[k.Name], Bundle: d.trust.Bundle,
			Hold: d.mayTell, Log: d.log, Now: d.clock.Now,
		})
		if err != nil {
			return fmt.Errorf("cluster %s: publish: %w", k.Name, err)
		}
		d.publishers[k.Name] = p
		d.registry.MustRegister(p)
	}
	return nil
}

// openSigners makes the doors of clusters' own certificates APIs. The host's name tells this CA from its replicas: it is
// the same after a restart.
func (d *daemon) openSigners() error {
	d.signers = map[string]*kubesigner.Signer{}
	for _, k := range d.config.Clusters {
		if !k.Signers.Enabled() {
			continue
		}
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("cluster %s: signers: %w", k.Name, err)
		}
		s, err := kubesigner.NewSigner(kubesigner.SignerOptions{
			Cluster: k.Name, Config: k.Signers, Connection: d.clusters[k.Name], Registration: d.registration, Replica: host, Log: d.log,
		})
		if err != nil {
			return fmt.Errorf("cluster %s: signers: %w", k.Name, err)
		}
		d.signers[k.Name] = s
		d.registry.MustRegister(s)
	}
	return nil
}
