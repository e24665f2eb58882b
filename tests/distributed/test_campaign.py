from raytrain_het.testing.campaign import campaign


def test_twenty_random_faults_lose_nothing():
    account = campaign(20, seed=1)
    assert account.clean, account
    assert account.faults == 20
    assert account.lost_checkpoints <= 1, account
